"""Adapter files of every trainer, in and out.

Each reader makes one record (`record.Adapter`), and each writer takes it.
"""
