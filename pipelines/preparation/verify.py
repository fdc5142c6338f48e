"""Is a prepared folder still what was written? Reads every byte of it again."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
from pydantic import ValidationError

from pipelines import storage
from pipelines.preparation.data_receipt import RECEIPT_JSON, RECEIPT_PAGE, DataReceipt
from pipelines.preparation.ledger import manifest_of
from pipelines.preparation.plan import MISSING_PLAN, PLAN_NAME, Plan, load_plan
from pipelines.preparation.sources import PlanError
from pipelines.shards.images import ImageObjectError, ImageStore, image_keys
from pipelines.shards.integrity import ShardError, check, missing
from pipelines.shards.manifest import MANIFEST_NAME, Manifest, QuarantineEntry, ShardEntry
from pipelines.shards.receipts import RECEIPT_FOLDER, Receipt, load_receipt, receipt_uris
from pipelines.stored_models import StoredModelError

_THREADS = 4
_REMEDY = f"restore it, or remove {MANIFEST_NAME} and prepare again: it is then written anew"  # of a data receipt


def verify(folder: str) -> list[str]:
    """One line for everything of the dataset in `folder` that is missing or not as the manifest says.

    Shards, shared images, quarantine table, plan and pins are hashed. The receipts carry times, so no hash can cover
    them: each chunk of the plan must have one, and plan and receipts must come to the manifest, field by field. The
    data receipt must name it. With what is damaged stands the receipt that must go for it to be made anew.

    Raises:
        ManifestError: `folder` holds no finished dataset.
    """
    manifest = Manifest.load(folder)

    store = ImageStore(folder)
    shared: dict[str, str] = {}  # image -> a shard with a row that names it

    def fault(entry: ShardEntry | QuarantineEntry) -> tuple[str, str] | None:
        uri = storage.join(folder, entry.name)
        try:
            data = storage.read_bytes(uri)
            check(entry, uri, data)
        except FileNotFoundError:
            return entry.name, str(missing(entry, uri))
        except ShardError as error:
            return entry.name, str(error)
        if isinstance(entry, ShardEntry):
            shared.update(dict.fromkeys(image_keys(pa.ipc.open_file(pa.py_buffer(data))), entry.name))
        return None

    def image_fault(key: str) -> tuple[str, str] | None:
        try:
            store.read(key)
        except ImageObjectError as error:
            return shared[key], str(error)
        return None

    with ThreadPoolExecutor(_THREADS) as threads:
        damaged = [each for each in threads.map(fault, [*manifest.shards, manifest.quarantine]) if each]
        damaged += [each for each in threads.map(image_fault, sorted(shared)) if each]
    receipts = _receipts_of(folder) if damaged else {}
    lines = [line + (f". Its receipt: {receipts[name]}" if name in receipts else "") for name, line in damaged]
    return [*lines, *_plan_faults(folder, manifest)]


def _receipts_of(folder: str) -> dict[str, str]:
    """Shard -> the receipt that names it, as far as receipts can be read."""
    place = storage.join(folder, RECEIPT_FOLDER)
    uris = [storage.join(place, name) for name in storage.list_names(place)]
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(_receipt, uris))
    pairs = zip(uris, found, strict=True)
    return {receipt.shard.name: uri for uri, receipt in pairs if isinstance(receipt, Receipt) and receipt.shard}


def _plan_faults(folder: str, manifest: Manifest) -> Iterator[str]:
    uri = storage.join(folder, PLAN_NAME)
    try:
        plan = load_plan(folder)
    except StoredModelError as error:
        yield str(error)
        return
    if plan is None or plan.identity() != manifest.plan:
        found = plan.identity() if plan else f"no such file; {MISSING_PLAN}"
        yield f"{uri}: expected the plan with sha256 {manifest.plan}, found {found}"
        return
    try:
        plan.load_pins(folder)
    except PlanError as error:
        yield str(error)
    yield from _receipt_faults(folder, manifest, plan)
    yield from _data_receipt_faults(folder, manifest)


def _receipt_faults(folder: str, manifest: Manifest, plan: Plan) -> Iterator[str]:
    uris = receipt_uris(folder, len(plan.chunks))
    with ThreadPoolExecutor(_THREADS) as threads:
        found = list(threads.map(_receipt, uris))
    yield from (each for each in found if isinstance(each, str))
    receipts = [each for each in found if isinstance(each, Receipt)]
    for uri, receipt in zip(uris, found, strict=True):
        if isinstance(receipt, Receipt) and receipt.plan != manifest.plan:
            yield f"{uri}: expected a receipt of plan {manifest.plan}, found one of {receipt.plan}"
    if len(receipts) < len(plan.chunks):
        return
    if [receipt.shard for receipt in receipts if receipt.shard] != manifest.shards:
        yield f"{folder}: the receipts name other shards than the manifest"
    due = manifest_of(plan, receipts, manifest.quarantine).model_dump(exclude={"plan", "shards"})
    uri = storage.join(folder, MANIFEST_NAME)
    found_there = manifest.model_dump(include=set(due))
    yield from (
        f"{uri}: {field} is {found_there[field]!r}, by the plan and its receipts {value!r}"
        for field, value in due.items()
        if found_there[field] != value
    )


def _data_receipt_faults(folder: str, manifest: Manifest) -> Iterator[str]:
    """It is for people and holds times, but it names the manifest that it tells of."""
    uri = storage.join(folder, RECEIPT_JSON)
    if not storage.exists(page := storage.join(folder, RECEIPT_PAGE)):
        yield f"{page}: expected the data receipt as a page, found no such file; {_REMEDY}"
    try:
        receipt = DataReceipt.model_validate_json(storage.read_bytes(uri))
    except FileNotFoundError:
        yield f"{uri}: expected the data receipt, found no such file; {_REMEDY}"
    except ValidationError as error:
        yield f"{uri}: not a data receipt: {error.errors()[0]['msg']}; {_REMEDY}"
    else:
        if (told := receipt.identities.get("manifest")) != manifest.identity():
            yield f"{uri}: tells of the manifest {told}; the one here is {manifest.identity()}"


def _receipt(uri: str) -> Receipt | str:
    try:
        return load_receipt(Receipt, uri)
    except StoredModelError as error:
        return str(error)
