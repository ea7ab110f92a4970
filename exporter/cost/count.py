"""What a captured graph costs, counted on the graph itself, and whether a variant skips what its plan promises.

Nothing here depends on the machine: FLOPs by class of operator, and bytes that must move between memory and the fused
loops in between. `machine_rates.py` turns a `Census` into a time on this machine.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode, mm_flop, sdpa_flop_count

from ...runtime.errors import ExportError
from ...runtime.manifest import Cost
from ...runtime.plan import Plan
from ..lower import w8a8
from ..passes.captured_graph import CapturedGraph
from ..private_torch import fake_tensor_mode, flatten_tree, map_tree, storage_key

FLOP_FORMULAS = {
    torch.ops.aten._int_mm: lambda a, b, *rest, **kwargs: mm_flop(a, b),
    **dict.fromkeys(
        (w8a8.INT8_OPERATOR, w8a8.FP8_OPERATOR),
        lambda x, weight, *rest, **kwargs: mm_flop((math.prod(x[:-1]), x[-1]), weight),
    ),
    w8a8.CONV2D_OPERATOR: lambda x, weight, scale, bias, kernel, stride, padding, out_shape: mm_flop(
        (math.prod(out_shape) // out_shape[1], weight[0]), weight
    ),
    # torch counts the attention of every device but this one, which it silently takes for free
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *rest, **kwargs: sdpa_flop_count(
        q, k, v
    ),
}
ATTENTION_OPS = ("scaled_dot_product_attention", "_scaled_dot_product")
OperatorClass = Literal["matmul", "convolution", "attention"]


@dataclass(frozen=True)
class Operand:
    """A tensor argument without its values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    constant: bool

    @property
    def bytes(self) -> int:
        """Size of the memory that the tensor spans."""
        reach = sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True))
        return (reach + 1) * self.dtype.itemsize


@dataclass(frozen=True)
class HeavyCall:
    """One call of a matrix product, a convolution or an attention. Equal calls compare equal, so each is timed once.

    `arguments` are the call's positional ones, with an `Operand` in place of each tensor; `keywords` are pairs.
    """

    op: Any
    arguments: tuple[Any, ...]
    keywords: tuple[tuple[str, Any], ...]
    flops: int

    @property
    def kind(self) -> OperatorClass:
        name = str(self.op)
        if any(op in name for op in ATTENTION_OPS):
            return "attention"
        return "convolution" if "conv" in name else "matmul"

    @property
    def operands(self) -> tuple[Operand, ...]:
        return tuple(a for a in (*self.arguments, *(v for _, v in self.keywords)) if isinstance(a, Operand))

    @property
    def label(self) -> str:
        """`matmul int8`: the class and the dtype of what is multiplied, of two the smaller."""
        dtype = min((o.dtype for o in self.operands[:2]), key=lambda d: d.itemsize)
        return f"{self.kind} {str(dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class FusedLoop:
    """One fused loop of everything else: what it reads from memory and writes to it, in bytes, and how many values it
    computes on the way."""

    reads: int
    writes: int
    values: int


@dataclass(frozen=True)
class Census:
    """All work of one run of a graph: heavy calls with how often each occurs, and the loops between them."""

    heavy: Mapping[HeavyCall, int]
    loops: tuple[FusedLoop, ...]

    @property
    def flops(self) -> int:
        return sum(call.flops * n for call, n in self.heavy.items())

    @property
    def moved_bytes(self) -> int:
        return sum(loop.reads + loop.writes for loop in self.loops)

    def flops_by_class(self) -> dict[str, int]:
        """FLOPs by `Heavy.label`, sorted."""
        counted: Counter[str] = Counter()
        for call, n in self.heavy.items():
            counted[call.label] += call.flops * n
        return dict(sorted(counted.items()))


def count_cost(graph: CapturedGraph, census: Census | None = None) -> Cost:
    """FLOPs (2 per multiply-add) in all and by class, ATen calls, bytes that the other operators move, and the constants
    that the graph reads, each once. `census` is the graph's, where it is known."""
    constants = {t.data_ptr(): t.nbytes for t in graph.constants().values()}
    counted = census or take_census(graph)
    return Cost(
        flops=counted.flops,
        flops_by_class=counted.flops_by_class(),
        moved_bytes=counted.moved_bytes,
        ops=sum(n.op == "call_function" for n in graph.gm.graph.nodes),
        constants=len(constants),
        constants_bytes=sum(constants.values()),
    )


def count_costs(
    groups: Mapping[str, Sequence[CapturedGraph]],
) -> tuple[dict[str, Census], dict[str, Cost]]:
    """Graph -> its census, and graph -> its cost, for the graphs of all components."""
    graphs = [g for group in groups.values() for g in group]
    censuses = {g.name: take_census(g) for g in graphs}
    return censuses, {g.name: count_cost(g, censuses[g.name]) for g in graphs}


def node_flops(node: fx.Node) -> int:
    """FLOPs of one call in a captured graph, by the shapes that tracing saw."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val"))
    if node.op != "call_function" or not any(isinstance(t, Tensor) for t in flatten_tree((args, kwargs))):
        return 0
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    target: Any = node.target
    with torch.no_grad(), counter:
        target(*args, **kwargs)
    return counter.get_total_flops()


def plan_share(plan: Plan, shares: Mapping[str, float]) -> float:
    """The plan's cost as a share of the same evaluations all computed; `shares` is variant -> share of the full one."""
    return sum(shares[e.variant] for e in plan.evaluations) / len(plan.evaluations)


# --- the census -----------------------------------------------------------------------------------------------------


def take_census(graph: CapturedGraph) -> Census:
    """Every operator of the graph, by one run on fake tensors."""
    counter = FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS)
    with torch.no_grad(), fake_tensor_mode() as fake, counter:
        walk = CensusWalk(graph.gm, fake, counter)
        walk.run(*(fake.from_tensor(t) for t in graph.args))
    return Census(dict(Counter(walk.heavy.values())), tuple(fuse_loops(walk)))


@dataclass(frozen=True)
class Result:
    """What a tensor of memory of its own is made by."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> Result:
        return cls(tuple(t.shape), t.stride(), t.dtype)

    def make(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype)


class CensusWalk(fx.Interpreter):
    """One run that notes, for every node, its FLOPs, its bytes, and whose memory its value is.

    `root` is the node that made that memory (a view has its base's), `depth` how many heavy calls must come before.
    """

    def __init__(self, gm: fx.GraphModule, fake: Any, counter: FlopCounterMode) -> None:
        super().__init__(gm)
        self.fake, self.counter = fake, counter
        self.heavy: dict[fx.Node, HeavyCall] = {}
        self.ends: list[fx.Node] = []
        self.root: dict[fx.Node, fx.Node] = {}
        self.depth: dict[fx.Node, int] = {}
        self.bytes: dict[fx.Node, int] = {}
        self.values: dict[fx.Node, int] = {}
        self.memory: dict[fx.Node, set[Any]] = {}
        self.seen: dict[str, tuple[Any, int]] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.fake.from_tensor(value) if isinstance(value, Tensor) else value

    def run_node(self, n: fx.Node) -> Any:
        value, flops = self.run_once(n)
        if n.op == "output":
            self.ends.append(n)
            return value
        tensors = [t for t in flatten_tree(value) if isinstance(t, Tensor)]
        self.bytes[n] = sum(min(t.nbytes, t.untyped_storage().nbytes()) for t in tensors)
        self.values[n] = sum(t.numel() for t in tensors)
        self.memory[n] = {storage_key(t) for t in tensors}
        base = next((a for a in n.all_input_nodes if self.memory[a] & self.memory[n]), None)
        self.root[n] = n if base is None else self.root[base]
        below = max((self.depth[a] for a in n.all_input_nodes), default=0)
        self.depth[n] = below + (flops > 0)
        if flops:
            self.heavy[n] = self.describe_call(n, flops)
        return value

    def run_once(self, n: fx.Node) -> tuple[Any, int]:
        """The node's value and its FLOPs. Of equal calls (layers of one shape) one alone is run; the others' results are made by
        its shapes, unless they share memory with an argument."""
        if n.op != "call_function":
            return super().run_node(n), 0
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        key = repr((n.target, map_tree(Tensor, lambda t: (tuple(t.shape), t.stride(), t.dtype), (args, kwargs))))
        if key in self.seen:
            made, flops = self.seen[key]
            with self.fake:
                return map_tree(Result, Result.make, made), flops
        before = self.counter.get_total_flops()
        value = super().run_node(n)
        flops = self.counter.get_total_flops() - before
        given = {storage_key(t) for t in flatten_tree((args, kwargs)) if isinstance(t, Tensor)}
        results = [t for t in flatten_tree(value) if isinstance(t, Tensor)]
        memory = {storage_key(t) for t in results}
        if len(memory) == len(results) and not memory & given:
            self.seen[key] = map_tree(Tensor, Result.of, value), flops
        return value, flops

    def describe_call(self, n: fx.Node, flops: int) -> HeavyCall:
        constants = {t for a in n.all_input_nodes if self.root[a].op == "get_attr" for t in self.memory[a]}

        def operand(t: Tensor) -> Operand:
            return Operand(tuple(t.shape), t.stride(), t.dtype, storage_key(t) in constants)

        args, kwargs = map_tree(Tensor, operand, self.fetch_args_kwargs_from_env(n))
        frozen = tuple(tuple(a) if isinstance(a, list) else a for a in args)
        return HeavyCall(n.target, frozen, tuple(sorted(kwargs.items())), flops)


def fuse_loops(walk: CensusWalk) -> Iterator[FusedLoop]:
    """The light operators as the compiler fuses them: a loop is everything at one depth that hangs together.

    Inside a loop values stay in registers or the nearest cache. A loop reads what heavy calls, inputs and earlier loops
    left in memory, each once, and writes what later ones read.
    """
    light = [n for n in walk.root if is_light(walk, n)]
    group = group_nodes(walk, light)
    reads: defaultdict[Any, dict[fx.Node, int]] = defaultdict(dict)
    writes: defaultdict[Any, dict[fx.Node, int]] = defaultdict(dict)
    for n in light:
        for a in n.all_input_nodes:
            root = walk.root[a]
            if group.get(root) != group[n]:
                seen = reads[group[n]].get(root, 0)
                reads[group[n]][root] = min(walk.bytes[root], seen + walk.bytes[a])
                if root in group:
                    writes[group[root]][root] = walk.bytes[root]
    for user in (*walk.heavy, *walk.ends):
        for root in {walk.root[a] for a in user.all_input_nodes}:
            if root in group:
                writes[group[root]][root] = walk.bytes[root]
    values = Counter[fx.Node]()
    for n in light:
        values[group[n]] += walk.values[n]
    for name in dict.fromkeys(group.values()):
        yield FusedLoop(sum(reads[name].values()), sum(writes[name].values()), values[name])


def is_light(walk: CensusWalk, n: fx.Node) -> bool:
    """Whether the node computes something new that is no heavy call."""
    return n.op == "call_function" and n not in walk.heavy and walk.root[n] is n and walk.bytes[n] > 0


def group_nodes(walk: CensusWalk, light: Iterable[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Light node -> the first node of its loop: those of one depth that are joined by what they pass on or share."""
    first: dict[fx.Node, fx.Node] = {}

    def find(n: fx.Node) -> fx.Node:
        while first[n] is not n:
            n = first[n]
        return n

    for n in light:
        first[n] = n
        for a in n.all_input_nodes:
            root = walk.root[a]
            if root in first and walk.depth[root] == walk.depth[n]:
                first[find(n)] = find(root)
    return {n: find(n) for n in first}


# --- what is promised, and held against the count -------------------------------------------------------------------


def module_flops(module: nn.Module, args: tuple[Tensor, ...]) -> dict[str, int]:
    """FLOPs inside each submodule in one run of `module(*args)`, by its path."""
    with torch.no_grad(), fake_tensor_mode() as fake:
        inputs = [fake.from_tensor(t) for t in args]
        with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
            module(*inputs)
    root = f"{type(module).__name__}."
    return {path.removeprefix(root): sum(ops.values()) for path, ops in counter.get_flop_counts().items()}


def count_attention_ops(graph: CapturedGraph) -> int:
    """How many attention calls the graph has."""
    return sum(
        n.op == "call_function" and any(op in str(n.target) for op in ATTENTION_OPS) for n in graph.gm.graph.nodes
    )


def check_skips(full: Cost, variant: Cost, name: str, skipped_flops: int) -> None:
    """Raises ExportError unless the variant really is `skipped_flops` cheaper than the full graph (within 1%).

    This is the guard against a skip that the compiler silently undid: what is promised is counted inside the skipped
    modules, what is held against it is counted on the pruned graph.
    """
    if variant.flops >= full.flops:
        raise ExportError(
            f"variant {name!r} skips nothing: {variant.flops:,} FLOPs, the full graph has {full.flops:,}; "
            "its sites feed values that are computed anyway, so choose other sites or no cache"
        )
    promised = full.flops - skipped_flops
    if variant.flops > promised + full.flops // 100:
        raise ExportError(
            f"variant {name!r} should cost {promised:,} FLOPs after skipping its sites, its graph has {variant.flops:,}; "
            "something outside the sites reads what they should have skipped"
        )
