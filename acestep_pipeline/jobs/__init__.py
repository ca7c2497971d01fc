"""Jobs for services: what may be asked for, and what is done. Every vendor's handler in `serverless/` runs these."""
