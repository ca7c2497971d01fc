"""Print what is installed here, Python's packages and the system's, as a CycloneDX 1.6 document without a time in it.

https://cyclonedx.org/docs/1.6/json/; package URLs: https://github.com/package-url/purl-spec
"""

import importlib.metadata
import json
import re
from pathlib import Path

DPKG = Path("/var/lib/dpkg/status")


def python_packages() -> list[dict]:
    """Every distribution that this interpreter sees."""
    found = {}
    for distribution in importlib.metadata.distributions():
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
        licence = distribution.metadata.get("License-Expression") or ""
        found[name] = component(name, distribution.version, f"pkg:pypi/{name}@{distribution.version}", licence)
    return [found[name] for name in sorted(found)]


def system_packages(status: Path = DPKG) -> list[dict]:
    """Every package that dpkg has installed."""
    found = []
    for paragraph in status.read_text(encoding="utf-8").split("\n\n") if status.is_file() else ():
        fields = dict(re.findall(r"^([\w-]+): (.*)$", paragraph, flags=re.MULTILINE))
        if fields.get("Status", "").endswith(" installed"):
            name, version, architecture = (fields[key] for key in ("Package", "Version", "Architecture"))
            found.append(component(name, version, f"pkg:deb/{name}@{version}?arch={architecture}", ""))
    return sorted(found, key=lambda each: each["purl"])


def component(name: str, version: str, purl: str, licence: str) -> dict:
    """One entry of the document."""
    licences = {"licenses": [{"expression": licence}]} if licence else {}
    return {"type": "library", "name": name, "version": version, "purl": purl, "bom-ref": purl, **licences}


if __name__ == "__main__":
    components = python_packages() + system_packages()
    print(
        json.dumps({"bomFormat": "CycloneDX", "specVersion": "1.6", "version": 1, "components": components}, indent=1)
    )
