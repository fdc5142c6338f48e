"""The training state of a DeepSpeed engine as named pieces, whatever the ZeRO stage and the number of workers.

ZeRO cuts each parameter's fp32 master weight and Adam moments into ranges, one rank holding each. Here a range is
called by what it is: the parameter's name, and where in the flattened parameter it begins. A rank writes its ranges to
one safetensors file, key `kind|start|name`; to load, a rank looks up the ranges that it holds *now*, which may overlap
those of several old ranks. So a checkpoint of 4 workers continues on 2, one of ZeRO 3 with ZeRO 1, and no pickle is
read. (DeepSpeed's own checkpoints are bound to the number of workers, DeepSpeed#5405; its universal ones are a second,
offline copy of everything, and have lost the optimizer's state without an error, DeepSpeed#6691.)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

if TYPE_CHECKING:
    from deepspeed import DeepSpeedEngine

WEIGHT = "weight"
MOMENTS = ("exp_avg", "exp_avg_sq")
KINDS = (WEIGHT, *MOMENTS)
_SHOWN = 8


class StateError(ValueError):
    """Stored training state does not fit the model; the message lists the parameters."""


@dataclass(frozen=True)
class Piece:
    """A range of one parameter's training state, as views into the tensors that the optimizer works on."""

    name: str
    start: int
    """Offset in the flattened parameter."""
    tensors: dict[str, torch.Tensor]
    """Kind -> float32[n]."""
    owned: bool = True
    """Whether this rank writes it. False where several ranks hold the same range and another one does."""

    @property
    def stop(self) -> int:
        """Offset behind the last element."""
        return self.start + self.tensors[WEIGHT].numel()


def live_pieces(engine: DeepSpeedEngine) -> list[Piece]:
    """What this rank holds of the parameters that learn."""
    learning = [(name, parameter) for name, parameter in engine.module.named_parameters() if parameter.requires_grad]
    cut = {0: _uncut, 1: _cut_by_stage_2, 2: _cut_by_stage_2, 3: _cut_by_stage_3}[engine.zero_optimization_stage()]
    return [piece for piece in cut(engine, learning) if piece.stop > piece.start]


def count_updates(engine: DeepSpeedEngine) -> int:
    """How often Adam has updated the parameters: its bias correction depends on it."""
    states = _adam(engine).state.values()
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def write_state(engine: DeepSpeedEngine, path: Path) -> None:
    """Write this rank's pieces to `path`, as they are now.

    Raises:
        OSError, safetensors.SafetensorError: The disk is full, or the place cannot be written.
    """
    tensors = {
        f"{kind}|{piece.start}|{piece.name}": tensor.detach().float().cpu()
        for piece in live_pieces(engine)
        if piece.owned
        for kind, tensor in piece.tensors.items()
    }
    save_file(tensors, path)


def load_state(engine: DeepSpeedEngine, files: Sequence[Path], updates: int) -> None:
    """Fill this rank's pieces from the files of all old ranks, then the model's weights. Collective.

    Raises:
        StateError: The files lack parameters that learn, or hold others, or leave gaps.
    """
    with ExitStack() as stack:
        stored = StoredState(files, stack)
        learning = {name: param for name, param in engine.module.named_parameters() if param.requires_grad}
        stored.require(learning)
        for piece in live_pieces(engine):
            for kind, tensor in piece.tensors.items():
                tensor.copy_(stored.read(kind, piece.name, piece.start, piece.stop))
    for state in _adam(engine).state.values():
        state["step"] = torch.full_like(state["step"], updates)
    _refresh_model(engine)


class StoredState:
    """The files of all ranks of a checkpoint, read as whole parameters.

    Args:
        files: One per rank that wrote.
        stack: Closes them.
    """

    def __init__(self, files: Sequence[Path], stack: ExitStack) -> None:
        self._ranges: dict[tuple[str, str], list[tuple[int, int, Any]]] = {}
        for path in files:
            file = stack.enter_context(safe_open(path, framework="pt"))
            for key in file.keys():  # noqa: SIM118  # not a mapping
                kind, start, name = key.split("|", 2)
                part = file.get_slice(key)
                found = (int(start), int(start) + part.get_shape()[0], part)
                self._ranges.setdefault((kind, name), []).append(found)

    @property
    def names(self) -> set[str]:
        """The parameters that are stored."""
        return {name for _, name in self._ranges}

    def require(self, learning: Any) -> None:
        """Raise `StateError` unless the stored parameters are the names in `learning`."""
        wrong = {
            "it lacks": sorted(set(learning) - self.names),
            "the model has none of": sorted(self.names - set(learning)),
        }
        listed = "; ".join(f"{what} {_listed(names)}" for what, names in wrong.items() if names)
        if listed:
            raise StateError(f"the checkpoint was made by a model with other learning parameters: {listed}")

    def read(self, kind: str, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements `start` to `stop` of a flattened parameter: float32[stop - start]."""
        found = torch.empty(stop - start)
        filled = 0
        for begin, end, part in self._ranges.get((kind, name), []):
            low, high = max(start, begin), min(stop, end)
            if low < high:
                found[low - start : high - start] = part[low - begin : high - begin]
                filled += high - low
        if filled != stop - start:
            raise StateError(f"{kind} of {name}: {filled} of the elements {start} to {stop} are stored")
        return found


def read_weights(files: Sequence[Path], shapes: dict[str, torch.Size]) -> dict[str, torch.Tensor]:
    """The fp32 master weights of a checkpoint, whole; for what needs the model and no optimizer.

    Args:
        files: One per rank that wrote.
        shapes: Of the parameters that learned.

    Raises:
        StateError: as `load_state`.
    """
    with ExitStack() as stack:
        stored = StoredState(files, stack)
        stored.require(shapes)
        return {name: stored.read(WEIGHT, name, 0, shape.numel()).view(shape) for name, shape in shapes.items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _adam(engine: DeepSpeedEngine) -> torch.optim.Optimizer:
    return engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer


def _moments(optimizer: torch.optim.Optimizer, weight: torch.Tensor) -> dict[str, Any]:
    """Adam's state of one of its tensors; before its first step, as that step would begin it."""
    state = optimizer.state[weight]
    if not state:
        state["step"] = torch.zeros((), device=weight.device)
        state.update({kind: torch.zeros_like(weight) for kind in MOMENTS})
    return state


def _uncut(engine: DeepSpeedEngine, learning: list[tuple[str, Any]]) -> Iterator[Piece]:
    """Stage 0: every rank holds everything, and they share the writing."""
    for index, (name, parameter) in enumerate(learning):
        state = _moments(engine.optimizer, parameter)
        tensors = {WEIGHT: parameter.data.view(-1)} | {kind: state[kind].view(-1) for kind in MOMENTS}
        yield Piece(name, 0, tensors, owned=index % engine.dp_world_size == engine.global_rank)


def _cut_by_stage_2(engine: DeepSpeedEngine, learning: list[tuple[str, Any]]) -> Iterator[Piece]:
    """Stages 1 and 2: a rank holds one range of all parameters laid end to end."""
    zero = engine.optimizer
    for name, parameter in learning:
        mapping = parameter._hp_mapping
        if mapping is None:  # wholly on other ranks
            continue
        flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
        state = _moments(zero.optimizer, flat)
        address = mapping.hp_fragment_address
        whole = {WEIGHT: flat} | {kind: state[kind] for kind in MOMENTS}
        tensors = {kind: tensor.data.narrow(0, address.start, address.numel) for kind, tensor in whole.items()}
        yield Piece(name, mapping.lp_fragment_address.start, tensors)


def _cut_by_stage_3(engine: DeepSpeedEngine, learning: list[tuple[str, Any]]) -> Iterator[Piece]:
    """Stage 3: a rank holds one range of each parameter; the last ones are padded to equal length."""
    zero = engine.optimizer
    for name, parameter in learning:
        group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        flat = zero.fp32_partitioned_groups_flat[group]
        state = _moments(zero.optimizer, flat)
        start = numel * engine.global_rank
        real = max(0, min(numel, parameter.ds_numel - start))
        whole = {WEIGHT: flat} | {kind: state[kind] for kind in MOMENTS}
        tensors = {kind: tensor.data.narrow(0, offset, real) for kind, tensor in whole.items()}
        yield Piece(name, start, tensors)


@torch.no_grad()
def _refresh_model(engine: DeepSpeedEngine) -> None:
    """Copy the master weights into the weights that the model computes with."""
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        zero.update_lp_params()
    elif stage == 3:
        zero._partition_all_parameters()
        for index in range(len(zero.fp16_groups)):
            zero._reassign_or_swap_out_partitioned_parameters(index)
        if zero.persistent_parameters:  # small ones, which stay whole on every rank
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
