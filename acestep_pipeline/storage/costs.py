"""What a store on S3 costs: its objects are counted, and multiplied by prices that the user fills in for a region."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ..data.text.text_files import one_line
from ..errors import UsageError
from .names import KINDS
from .release_manifest import CHECKPOINTS_FOLDER
from .s3 import open_client, parse_address, s3_errors
from .transfer_progress import PART_BYTES, is_large

# In which S3 bills ("Amazon S3 FAQs", billing: a GB-month is of 2**30 bytes).
GB = 2**30
_MAX_PRICES_BYTES = 100_000
# Per storage class, what its prices are called in the file, and after how much they are.
CLASS_PRICES = ("gb_month", "put_1000", "get_1000", "retrieval_gb")
TEMPLATE = """\
# What your region charges: fill in from your provider's price list, e.g. https://aws.amazon.com/s3/pricing/
# A price that is left empty is left out of the sums, and named. Storage classes that you don't use may go.
region:
as_of:            # the date of the price list
currency: USD
classes:
  STANDARD:
    gb_month:     # storage, per GB (2^30 bytes) and month
    put_1000:     # per 1,000 PUT, COPY, POST and LIST requests
    get_1000:     # per 1,000 GET and other requests
    retrieval_gb: 0
  STANDARD_IA:
    gb_month:
    put_1000:
    get_1000:
    retrieval_gb: # per GB that is read
  INTELLIGENT_TIERING:
    gb_month:     # of the tier that most of it is in
    put_1000:
    get_1000:
    retrieval_gb: 0
transfer_out_gb:  # per GB that leaves the region; 0 to machines within it
"""


@dataclass(frozen=True)
class Holding:
    """What lies in one part of the layout in one storage class: objects and those of them that are old versions, bytes
    with these and without; and the requests that send it (also LIST, at 1,000 keys each) and that fetch it."""

    kind: str
    storage_class: str
    num_objects: int
    num_old: int
    size: int
    current_size: int
    num_puts: int
    num_gets: int


@dataclass(frozen=True)
class Prices:
    """A region's prices; None where none was filled in."""

    currency: str
    said: str
    classes: dict[str, dict[str, float | None]]
    transfer_out_gb: float | None


@dataclass(frozen=True)
class Cost:
    """What a holding costs a month, to send once more and to fetch once; None where a price is missing."""

    month: float | None
    push: float | None
    pull: float | None


def count_holdings(address: str, *, above: str = "") -> list[Holding]:
    """Count what lies at and below an address, old versions and all.

    Args:
        above: the part of a name that the address stands for already, such as `lora`.

    Raises:
        UsageError: S3 refuses.
        RunError: the connection broke.
    """
    bucket, folder = parse_address(address)
    found: dict[tuple[str, str], list[tuple[int, bool]]] = {}
    with s3_errors(address):
        pages = open_client(1).get_paginator("list_object_versions").paginate(Bucket=bucket, Prefix=folder)
        for page in pages:
            for entry in page.get("Versions", []):
                name = "/".join(filter(None, (above.strip("/"), entry["Key"].removeprefix(folder))))
                group = _kind(name), entry.get("StorageClass") or "STANDARD"
                found.setdefault(group, []).append((entry["Size"], entry.get("IsLatest", True)))
    return [summarise(kind, storage_class, objects) for (kind, storage_class), objects in sorted(found.items())]


def summarise(kind: str, storage_class: str, objects: Iterable[tuple[int, bool]]) -> Holding:
    """Count objects, given by their bytes and whether each is current; old versions are neither sent nor fetched."""
    objects = list(objects)
    current = [size for size, is_current in objects if is_current]
    parts = [-(-size // PART_BYTES) if is_large(size) else 1 for size in current]
    listings = -(-len(current) // 1000)
    return Holding(
        kind,
        storage_class,
        num_objects=len(objects),
        num_old=len(objects) - len(current),
        size=sum(size for size, _ in objects),
        current_size=sum(current),
        # One that goes in parts is also begun and completed.
        num_puts=sum(number if number == 1 else number + 2 for number in parts) + listings,
        num_gets=sum(parts),
    )


def _kind(key: str) -> str:
    first, _, rest = key.partition("/")
    if f"/{CHECKPOINTS_FOLDER}/" in rest and first == "lora":
        return f"lora/…/{CHECKPOINTS_FOLDER}"
    return first if first in KINDS and rest else "other"


def cost_of(holding: Holding, prices: Prices) -> Cost:
    """What a holding costs by a region's prices."""
    own = prices.classes.get(holding.storage_class, {})
    month, put, get, retrieval = (own.get(name) for name in CLASS_PRICES)
    gb = holding.current_size / GB
    return Cost(
        month=_sum((holding.size / GB, month)),
        push=_sum((holding.num_puts / 1000, put)),
        pull=_sum((holding.num_gets / 1000, get), (gb, retrieval), (gb, prices.transfer_out_gb)),
    )


def _sum(*products: tuple[float, float | None]) -> float | None:
    if any(price is None for _, price in products):
        return None
    return sum(amount * price for amount, price in products)


def read_prices(path: Path) -> Prices:
    """Read a file like `TEMPLATE`.

    Raises:
        UsageError: it is not there, no such file, or a price is no number.
    """
    import yaml

    shown = one_line(str(path))
    try:
        if path.stat().st_size > _MAX_PRICES_BYTES:
            raise UsageError(f"{shown} is no price list: it is larger than {_MAX_PRICES_BYTES} bytes.")
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{shown} can't be read ({error.strerror}); make it with --template.") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UsageError(f"{shown} is no YAML ({type(error).__name__}); make it anew with --template.") from error
    names = {"region", "as_of", "currency", "classes", "transfer_out_gb"}
    if not isinstance(content, dict) or not isinstance(content.get("classes"), dict) or content.keys() - names:
        raise UsageError(f"{shown} is no price list; make it anew with --template.")
    classes = {}
    for storage_class, own in content["classes"].items():
        own = {} if own is None else own
        if not isinstance(own, dict) or (unknown := own.keys() - set(CLASS_PRICES)):
            wrong = "it" if not isinstance(own, dict) else sorted(map(str, unknown))[0]
            raise UsageError(
                f"{shown}: {one_line(str(storage_class))} has the prices {', '.join(CLASS_PRICES)}, not {wrong}."
            )
        classes[str(storage_class)] = {name: _price(own.get(name), shown, name) for name in CLASS_PRICES}
    said = ", ".join(one_line(str(content[name])) for name in ("region", "as_of") if content.get(name))
    return Prices(
        currency=one_line(str(content.get("currency") or "")),
        said=said,
        classes=classes,
        transfer_out_gb=_price(content.get("transfer_out_gb"), shown, "transfer_out_gb"),
    )


def _price(value: object, shown: str, name: str) -> float | None:
    if value is None:
        return None
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:
        raise UsageError(f"{shown}: {name} is {one_line(str(value))[:40]!r}, which is no price; write e.g. 0.023.")
    return float(value)


def table(holdings: list[Holding], prices: Prices | None) -> list[str]:
    """The holdings as lines for a person, with their costs where there are prices, and the sums."""
    head = ["", "class", "objects", "old", "GB", "PUTs", "GETs"]
    head += [f"{prices.currency} {what}".strip() for what in ("a month", "to push", "to pull")] if prices else []
    rows, sums, unpriced = [head], [0.0, 0.0, 0.0], set()
    for each in holdings:
        row = [each.kind, each.storage_class, f"{each.num_objects:,}", f"{each.num_old:,}", f"{each.size / GB:,.3f}"]
        row += [f"{each.num_puts:,}", f"{each.num_gets:,}"]
        if prices:
            cost = cost_of(each, prices)
            for index, value in enumerate((cost.month, cost.push, cost.pull)):
                row.append("?" if value is None else f"{value:,.4f}")
                sums[index] += value or 0.0
                if value is None:
                    unpriced.add(each.storage_class)
        rows.append(row)
    total = ["all", "", *(f"{sum(getattr(each, name) for each in holdings):,}" for name in ("num_objects", "num_old"))]
    total.append(f"{sum(each.size for each in holdings) / GB:,.3f}")
    total += [f"{sum(getattr(each, name) for each in holdings):,}" for name in ("num_puts", "num_gets")]
    rows.append(total + ([f"{value:,.4f}" for value in sums] if prices else []))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = []
    for row in rows:
        cells = [text.ljust(width) if index < 2 else text.rjust(width)
                 for index, (text, width) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    if unpriced:
        lacking = ", ".join(sorted(unpriced))
        lines.append(f"?: the price list lacks prices of {lacking}, or of transfer; they are left out of the sums")
    return lines
