"""The manifest: the one file that makes a folder of shards a dataset. It is written last and read first."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pipelines import storage
from pipelines.stored_models import StoredModelError, parse_model

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
REMEDY = "restore it, or remove it and run the job again: it is then written anew"

Payload = Literal["original", "pixels", "features"]
Layout = Literal["chat", "caption"]


class ManifestError(ValueError):
    """A folder has no manifest, or one that cannot be read."""


class ShardEntry(BaseModel):
    """One shard, and what a sampler must know of its rows without opening it: a number per row, in row order."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    """Path below the dataset's folder; the file's name is its sha256."""
    rows: int
    bytes: int
    sha256: str
    num_tokens: list[int]
    num_loss_tokens: list[int]
    has_image: list[bool]
    num_turns: list[int]
    row_offsets: list[int] | None = None
    """Row i is the message at bytes `row_offsets[i]` up to `row_offsets[i + 1]`; null in manifests of before."""
    row_checksums: list[str] | None = None
    """XXH3 (64 bits) of each row's bytes: notices damage at a fifteenth of the cost of a sha256."""
    frame_checksum: str | None = Field(default=None, exclude_if=lambda checksum: checksum is None)
    """The same of the bytes before the first row and behind the last. Manifests of before have none and stay equal."""


class QuarantineEntry(BaseModel):
    """The table of the rows that could not become samples."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    rows: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """A finished dataset. It holds no times and no host names: equal work gives an equal manifest."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    version: int = MANIFEST_VERSION
    plan: str
    """Hash of the plan that this dataset carries out."""
    payload: Payload
    layout: Layout
    max_length: int
    tiling: str
    num_image_tokens: int
    image_shape: list[int] | None
    """Shape of every stored array: [T, 3, H, W] pixels, [T, P, D] features; null for encoded images."""
    image_dtype: str | None = None
    """Of every stored array: uint8 pixels, float16 or int8 features; null for encoded images."""
    processor_identity: str
    encoder_identity: str | None
    """Hash of the frozen tower whose features are stored; null for the other payloads."""
    arrow_schema: dict[str, str] = Field(alias="schema")
    planned: int
    written: int
    quarantined: int
    quarantine_reasons: dict[str, int]
    quarantine: QuarantineEntry
    shards: list[ShardEntry]

    @classmethod
    def load(cls, folder: str) -> Manifest:
        """Read the manifest of the dataset in `folder`.

        Raises:
            ManifestError: there is none (the preparation has not finished), or it is not one of ours.
        """
        uri = storage.join(folder, MANIFEST_NAME)
        try:
            data = storage.read_bytes(uri)
        except (FileNotFoundError, NotADirectoryError) as error:
            raise ManifestError(
                f"{folder}: no {MANIFEST_NAME} here: this is no prepared dataset, or its preparation has not finished; "
                "run jobs/prepare.py with its recipe to finish it"
            ) from error
        try:
            return parse_model(cls, uri, data, f"a manifest of version {MANIFEST_VERSION}", REMEDY)
        except StoredModelError as error:
            raise ManifestError(str(error)) from error

    def to_json(self) -> bytes:
        """The bytes that are stored; equal manifests give equal bytes."""
        return self.model_dump_json(by_alias=True).encode()

    def identity(self) -> str:
        """The sha256 of the manifest: a training run that resumes compares it."""
        return storage.sha256(self.to_json())
