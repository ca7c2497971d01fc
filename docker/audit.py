"""Check the image's lock files, and an image's list of packages against one: every package pinned, with its hashes.

python docker/audit.py LOCK ... [--sbom FILE]      FILE: an image's /opt/sbom.cdx.json

Status 2 and a line for each thing that is wrong. Known vulnerabilities are `make audit`'s, which asks PyPI.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

OURS = "ace-step-lora"
_HASH = re.compile(r"--hash=sha256:[0-9a-f]{64}")


def read_lock(path: Path) -> tuple[dict[str, set[str]], list[str]]:
    """The versions of each package that a lock file pins (several where platforms differ), and what is wrong."""
    versions: dict[str, set[str]] = {}
    problems = []
    lines = re.sub(r"\\\n", " ", path.read_text("utf-8")).splitlines()
    for line in filter(None, (line.partition("#")[0].strip() for line in lines)):
        text, *hashes = re.split(r"\s+(?=--hash=)", line)
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            problems.append(f"{path}: {text!r} is no requirement: an option, an address or a file has no place here.")
            continue
        pins = [one.version for one in requirement.specifier if one.operator == "==" and "*" not in one.version]
        if requirement.url or len(requirement.specifier) != 1 or not pins:
            problems.append(f"{path}: {requirement.name} is not pinned with ==.")
        elif not hashes or not all(_HASH.fullmatch(one) for one in hashes):
            problems.append(f"{path}: {requirement.name} has no SHA-256 of its files.")
        versions.setdefault(canonicalize_name(requirement.name), set()).update(pins)
    return versions, problems or ([] if versions else [f"{path} pins nothing."])


def unlocked(sbom: Path, versions: dict[str, set[str]]) -> list[str]:
    """What an image has of Python's packages that is not of the lock's versions."""
    components = json.loads(sbom.read_text("utf-8"))["components"]
    installed = {one["name"]: one["version"] for one in components if one["purl"].startswith("pkg:pypi/")}
    if not installed:
        return [f"{sbom} lists no package of Python's."]
    return [
        f"{sbom}: {name} {version} is installed; locked: {', '.join(sorted(versions.get(name, ()))) or 'none'}."
        for name, version in sorted(installed.items())
        if name != OURS and version not in versions.get(name, ())
    ]


def main() -> int:
    """Print what is wrong; the status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("locks", nargs="+", type=Path, metavar="LOCK")
    parser.add_argument("--sbom", type=Path, metavar="FILE")
    args = parser.parse_args()
    for path in filter(None, [*args.locks, args.sbom]):
        if not path.is_file():
            parser.error(f"{path} is no file.")
    problems, together = [], {}
    for lock in args.locks:
        versions, wrong = read_lock(lock)
        problems += wrong
        for name, pinned in versions.items():
            together.setdefault(name, set()).update(pinned)
    problems += unlocked(args.sbom, together) if args.sbom else []
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr)
    if not problems:
        print(f"{len(together)} packages, each pinned with the hashes of its files.")
    return 2 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
