"""A PyTorch module as a `Workload`, through `torch.export` on tensors without data."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from bitwright.core.errors import InputError
from bitwright.core.operators import (
    ACTIVATION_FLOPS,
    BATCH_NORM_FLOPS,
    LAYER_NORM_FLOPS,
    RMS_NORM_FLOPS,
    SOFTMAX_FLOPS,
    Operand,
    attention,
    causal_density,
    convolution,
    gather,
    pointwise,
    product,
)
from bitwright.core.workload import Kind, Operator, Role, Workload

if TYPE_CHECKING:
    import torch


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_FORMATS = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "int64": "int64", "int32": "int32",
    "int16": "int16", "int8": "int8", "uint8": "uint8", "bool": "bool", "float8_e4m3fn": "fp8", "float8_e5m2": "fp8",
    "complex64": "complex64", "complex128": "complex128",
}  # fmt: skip

# ATen names without overload. Views share storage and cost nothing.
_VIEWS = _names(
    "view _unsafe_view reshape transpose t permute unsqueeze squeeze expand expand_as slice select split unbind "
    "chunk split_with_sizes narrow flatten unflatten alias detach diagonal view_as as_strided real imag movedim "
    "swapaxes numpy_T mT adjoint unfold lift_fresh lift_fresh_copy view_as_real view_as_complex dropout "
    "_reshape_alias native_dropout alpha_dropout feature_dropout wait_tensor"
)
_COPIES = _names(
    "clone contiguous cat concat stack copy constant_pad_nd pad _to_copy to repeat repeat_interleave roll flip "
    "select_scatter slice_scatter fill full_like zeros_like ones_like empty_like masked_fill where tile "
    "pixel_shuffle pixel_unshuffle im2col col2im reflection_pad1d reflection_pad2d replication_pad2d "
    "channel_shuffle tril triu broadcast_tensors new_zeros new_ones new_full full zeros ones empty arange "
    "scalar_tensor type_as eye empty_permuted empty_strided linspace rand randn rand_like randn_like bernoulli "
    "select_copy slice_copy"
)
_GATHERS = _names("embedding index gather index_select take _unsafe_index embedding_bag _embedding_bag")
_SCATTERS = _names("index_put scatter scatter_add index_add index_copy scatter_reduce _unsafe_index_put")
_REDUCTIONS = _names(
    "sum mean amax amin max min prod var std argmax argmin any all norm linalg_vector_norm logsumexp var_mean "
    "max_dim std_mean avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices "
    "max_pool3d_with_indices adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool2d "
    "_adaptive_avg_pool2d _adaptive_avg_pool3d topk sort median aminmax count_nonzero nansum"
)
_SCANS = _names("cumsum cumprod cummax cummin logcumsumexp")
_NORMS = {
    "layer_norm": LAYER_NORM_FLOPS, "native_layer_norm": LAYER_NORM_FLOPS, "group_norm": LAYER_NORM_FLOPS,
    "native_group_norm": LAYER_NORM_FLOPS, "instance_norm": LAYER_NORM_FLOPS, "rms_norm": RMS_NORM_FLOPS,
    "_fused_rms_norm": RMS_NORM_FLOPS, "batch_norm": BATCH_NORM_FLOPS,
    "_native_batch_norm_legit_no_training": BATCH_NORM_FLOPS, "_native_batch_norm_legit": LAYER_NORM_FLOPS,
    "_native_batch_norm_legit_functional": LAYER_NORM_FLOPS, "native_batch_norm": LAYER_NORM_FLOPS,
}  # fmt: skip
_SOFTMAXES = _names("softmax _softmax log_softmax _log_softmax _safe_softmax")
_ELEMENTWISE = _names(
    "add sub rsub mul div neg abs exp exp2 expm1 log log2 log1p sqrt rsqrt reciprocal pow sin cos tan tanh "
    "sigmoid relu relu6 leaky_relu gelu silu elu mish hardtanh hardswish hardsigmoid softplus prelu clamp "
    "clamp_min clamp_max maximum minimum erf floor ceil round trunc sign eq ne lt le gt ge logical_and "
    "logical_or logical_not logical_xor addcmul addcdiv lerp square atan2 fmod remainder floor_divide "
    "bitwise_and bitwise_or bitwise_not bitwise_xor isnan isinf selu celu logsigmoid diff log_sigmoid_forward glu "
    "threshold upsample_nearest2d upsample_bilinear2d sinh cosh acos asin __and__ __or__ __xor__ true_divide "
    "masked_fill logical_not bitwise_left_shift bitwise_right_shift"
)
_PRODUCTS = _names("mm bmm matmul linear addmm baddbmm mv addmv dot vdot")
_CONVOLUTIONS = _names("convolution conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d")
_IGNORED = _names("_assert_tensor_metadata _assert_async sym_size _assert_scalar sym_constrain_range")
# Composite operations without a kind of their own, taken apart into those that have one.
_TAKEN_APART = _names(
    "einsum gru lstm rnn_tanh rnn_relu gru_cell lstm_cell rnn_tanh_cell tensordot inner outer ger kron "
    "chain_matmul linalg_multi_dot bilinear addbmm addr cdist matrix_power linalg_matrix_power"
)


def trace_torch(
    module: torch.nn.Module, example_inputs: Sequence[Any], name: str = "", *, keywords: dict[str, Any] | None = None
) -> Workload:
    """The operators `module` executes for `example_inputs` (positional; `keywords` by name), from its exported graph.

    Nothing is computed: parameters and inputs may be on the meta device, so a model of any size needs no memory.
    Parameters and buffers are tensors of role WEIGHT. Views cost nothing and keep the name of the tensor they look at.
    An operation not understood becomes an operator of kind UNKNOWN with its bytes, named in the notes. The module is
    exported in the mode it is in (dropout counts nothing in either).

    Raises InputError for a module that cannot be exported, an input or tensor with a zero extent, and formats that
    have no name here.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    for leaf in tree_leaves((list(example_inputs), keywords or {})):
        if isinstance(leaf, torch.Tensor) and 0 in leaf.shape:
            raise InputError(f"An example input has shape {tuple(leaf.shape)}; every extent must be at least 1.")
    label = name or type(module).__name__
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(module, tuple(example_inputs), keywords or {})
            table = torch.export.default_decompositions()
            program = program.run_decompositions({key: table[key] for key in table if _base(key) in _TAKEN_APART})
    except InputError:
        raise
    except Exception as error:  # torch.export raises many kinds, all of them about the module or its inputs
        first = next((line for line in str(error).splitlines() if line.strip()), "").strip()
        raise InputError(
            f"{label} cannot be exported with torch.export ({type(error).__name__}: {first}). Give inputs its forward "
            f"accepts, and a forward without branches on tensor values."
        ) from error
    return _Graph(program, label).workload()


def _base(target: Any) -> str:
    """ATen name without namespace, overload or trailing underscore of an in-place variant."""
    name = str(getattr(target, "__name__", target)).split(".")[0]
    return name if name.startswith("__") else name.rstrip("_")


@dataclass
class _Call:
    """One call in the graph: flattened input operands, output operands and the arguments by name."""

    name: str
    base: str
    target: str
    inputs: list[Operand]
    outputs: list[Operand]
    arguments: dict[str, Any]

    def argument(self, name: str, default: Any = None) -> Any:
        value = self.arguments.get(name)
        return default if value is None else value


class _Graph:
    """Walks an exported graph; `operands` maps each node to its operand (or operands)."""

    def __init__(self, program: Any, name: str) -> None:
        self.name, self.nodes = name, list(program.graph.nodes)
        signature = program.graph_signature
        self.names = {
            **signature.inputs_to_parameters, **signature.inputs_to_buffers,
            **signature.inputs_to_lifted_tensor_constants,
        }  # fmt: skip
        self.operands: dict[Any, Any] = {}
        self.operators: list[Operator] = []
        self.unknown: dict[str, int] = {}
        self.used: dict[str, int] = {}

    def workload(self) -> Workload:
        for node in self.nodes:
            if node.op == "placeholder":
                weight = self.names.get(node.name)
                role = Role.WEIGHT if weight else None
                self.operands[node] = self.fresh(node.meta.get("val"), weight or node.name, role)
            elif node.op == "call_function":
                self.call(node)
        notes = [f"Unknown operation {target} ({count} times) is counted by its bytes only."
                 for target, count in sorted(self.unknown.items())]  # fmt: skip
        return Workload(self.name, tuple(self.operators), tuple(notes))

    def fresh(self, value: Any, name: str, role: Role | None = None) -> Any:
        """Operand (or list of operands) for a node's value, under a name."""
        import torch

        if isinstance(value, (list, tuple)):
            return [self.fresh(each, f"{name}:{index}", role) for index, each in enumerate(value)]
        if not isinstance(value, torch.Tensor):
            return None
        shape = tuple(int(extent) for extent in value.shape)
        kind = str(value.dtype).removeprefix("torch.")
        if kind not in _FORMATS:
            raise InputError(f"{self.name}: tensor {name} has type {kind}, which has no format here.")
        default = Role.INDEX if kind in ("int64", "int32") else Role.ACTIVATION
        return Operand(name, shape, _FORMATS[kind], role or default)

    def call(self, node: Any) -> None:
        base = _base(node.target)
        value = node.meta.get("val")
        if base == "getitem":
            source = self.operands.get(node.args[0])
            self.operands[node] = source[node.args[1]] if isinstance(source, list) else source
            return
        inputs: list[Operand] = []
        for each in node.all_input_nodes:
            operand = self.operands.get(each)
            inputs.extend(one for one in (operand if isinstance(operand, list) else [operand]) if one is not None)
        made = self.fresh(value, node.name)
        if base in _IGNORED or made is None:
            self.operands[node] = made
            return
        if base in _VIEWS and inputs:
            self.operands[node] = self.view(made, inputs[0], value)
            return
        outputs = [one for one in (made if isinstance(made, list) else [made]) if one is not None]
        self.operands[node] = made
        if base == "_native_batch_norm_legit_no_training":
            outputs = outputs[:1]  # the saved statistics are empty at inference
        present = [one for one in outputs if one.elements]
        if not present:
            return  # an empty result is no work
        inputs = [one for one in inputs if one.elements]
        schema = getattr(node.target, "_schema", None)
        arguments = dict(zip((each.name for each in schema.arguments), node.args, strict=False)) if schema else {}
        arguments |= node.kwargs
        call = _Call(self.unique(node), base, str(node.target), inputs, present, arguments)
        self.operators.append(self.operator(call))

    def view(self, made: Any, source: Operand, value: Any) -> Any:
        """The same storage under another shape: the source's name, and no more elements than it stores."""
        if isinstance(made, list):
            values = list(value)
            return [self.view(each, source, values[index]) if each is not None else None
                    for index, each in enumerate(made)]  # fmt: skip
        strides = value.stride() if value.layout.__str__() == "torch.strided" else ()
        distinct = math.prod(e for e, s in zip(made.shape, strides, strict=False) if s != 0)
        stored = min(math.prod(made.shape), distinct, source.elements) if strides else None
        return replace(
            made, name=source.name, role=source.role, stored=None if stored == math.prod(made.shape) else stored
        )

    def unique(self, node: Any) -> str:
        """`path.of.module` of a node, or its own name; numbered when a module runs several operations."""
        stack = node.meta.get("nn_module_stack") or {}
        path = list(stack.values())[-1][0] if stack else ""
        path = path.removeprefix("L['self'].").replace("L['self']", "")
        name = f"{path}.{node.name}" if path else node.name
        count = self.used.get(name, 0)
        self.used[name] = count + 1
        return f"{name}#{count}" if count else name

    def of(self, argument: Any) -> Operand | None:
        operand = self.operands.get(argument) if argument is not None and hasattr(argument, "op") else None
        return operand if isinstance(operand, Operand) else None

    def operator(self, call: _Call) -> Operator:
        """The operator of one call."""
        base = call.base
        if base in _PRODUCTS:
            return self.product(call)
        if base in _CONVOLUTIONS:
            return self.convolution(call)
        if base.startswith("scaled_dot_product") or base.startswith("_scaled_dot_product"):
            return self.attention(call)
        if base in _GATHERS:
            table = self.of(call.argument("weight", call.argument("self"))) or call.inputs[0]
            index = [each for each in call.inputs if each is not table]
            return gather(call.name, table, index, call.outputs[0], target=call.target)
        if call.target.startswith(("_c10d_functional", "c10d_functional", "_dtensor")):
            return self.points(call, Kind.COLLECTIVE, 0.0)
        simple: Iterable[tuple[Any, Kind, Callable[[str], float]]] = (
            (_NORMS, Kind.NORMALISATION, _NORMS.__getitem__),
            (_SOFTMAXES, Kind.SOFTMAX, lambda _: SOFTMAX_FLOPS),
            (_COPIES, Kind.COPY, lambda _: 0.0),
            (_SCATTERS, Kind.GATHER, lambda _: 0.0),
            (_SCANS, Kind.SCAN, lambda _: 1.0),
            (_ELEMENTWISE, Kind.ELEMENTWISE, lambda each: ACTIVATION_FLOPS.get(each, 1.0)),
        )
        if base in _REDUCTIONS:
            return self.reduction(call)
        for names, kind, flops in simple:
            if base in names:
                return self.points(call, kind, flops(base))
        self.unknown[call.target] = self.unknown.get(call.target, 0) + 1
        return self.points(call, Kind.UNKNOWN, 0.0)

    def points(self, call: _Call, kind: Kind, flops: float) -> Operator:
        return pointwise(call.name, kind, call.inputs, call.outputs, call.outputs[0].shape, flops, target=call.target)

    def reduction(self, call: _Call) -> Operator:
        if not call.inputs:
            return self.points(call, Kind.REDUCTION, 1.0)
        source, out = call.inputs[0], call.outputs[0]
        if "pool" in call.base:  # every output looks at a window
            rank = int(call.base[call.base.index("pool") + 4])
            window = call.argument("kernel_size")
            if window is None:
                taps = math.prod(
                    max(1, math.ceil(a / b)) for a, b in zip(source.shape[-rank:], out.shape[-rank:], strict=True)
                )
            else:
                sizes = [window] if isinstance(window, int) else list(window)
                taps = math.prod(sizes) if len(sizes) == rank else sizes[0] ** rank
            return self.points(call, Kind.REDUCTION, float(taps))
        dims = call.argument("dim", [] if "dim" not in call.target else None)
        dims = [dims] if isinstance(dims, int) else list(dims or range(len(source.shape)))
        reduced = [each % max(1, len(source.shape)) for each in dims]
        return pointwise(call.name, Kind.REDUCTION, call.inputs, call.outputs, source.shape, 1.0, reduced=reduced,
                         target=call.target)  # fmt: skip

    def product(self, call: _Call) -> Operator:
        arguments, out = call.arguments, call.outputs[0]
        if call.base == "linear":
            left, right, addend = (self.of(arguments.get(each)) for each in ("input", "weight", "bias"))
        elif call.base in ("addmm", "baddbmm", "addmv"):
            keys = {"addmm": ("mat1", "mat2"), "baddbmm": ("batch1", "batch2"), "addmv": ("mat", "vec")}[call.base]
            left, right, addend = self.of(arguments[keys[0]]), self.of(arguments[keys[1]]), self.of(arguments["self"])
            if call.arguments.get("beta") == 0:
                addend = None
        else:
            left, right = (self.of(each) for each in list(arguments.values())[:2])
            addend = None
        if left is None or right is None:
            raise InputError(f"{self.name}: the operands of {call.name} ({call.target}) are not tensors.")
        a, b = left.shape, right.shape
        if call.base == "linear":
            b = tuple(reversed(b))
        k = a[-1]
        n = b[-1] if len(b) > 1 else 1
        m = a[-2] if len(a) > 1 else 1
        batch = math.prod(out.shape) // (m * n)
        shared = math.prod(b[:-2]) == 1
        return product(call.name, left, right, out, batch, m, n, k, shared_right=shared,
                       extra=[addend] if addend is not None else (), target=call.target)  # fmt: skip

    def convolution(self, call: _Call) -> Operator:
        arguments = call.arguments
        data, weight = self.of(arguments["input"]), self.of(arguments["weight"])
        if data is None or weight is None:
            raise InputError(f"{self.name}: the operands of {call.name} ({call.target}) are not tensors.")
        rank = len(weight.shape) - 2

        def spread(value: Any) -> list[int]:
            listed = [value] if isinstance(value, int) else [int(each) for each in value]
            return listed * rank if len(listed) == 1 else listed

        transposed = bool(arguments.get("transposed")) or "transpose" in call.base
        bias = self.of(arguments.get("bias"))
        return convolution(
            call.name, data, weight, call.outputs[0], spread(call.argument("stride", 1)),
            spread(call.argument("dilation", 1)), int(call.argument("groups", 1)), transposed=transposed,
            extra=[bias] if bias else (), target=call.target,
        )  # fmt: skip

    def attention(self, call: _Call) -> Operator:
        query, key, value = (self.of(call.arguments[each]) for each in ("query", "key", "value"))
        if query is None or key is None or value is None:
            raise InputError(f"{self.name}: the operands of {call.name} ({call.target}) are not tensors.")
        mask = self.of(call.argument("attn_mask", call.argument("attn_bias")))
        queries, depth = query.shape[-2:]
        keys, width = value.shape[-2:]
        heads = query.shape[-3] if len(query.shape) > 2 else 1
        kv_heads = key.shape[-3] if len(key.shape) > 2 else 1
        if heads % kv_heads:
            kv_heads = heads
        # PyTorch aligns its causal mask with the first key, whatever the number of keys.
        density = causal_density(queries, keys, 0) if call.argument("is_causal", False) else 1.0
        return attention(
            call.name, query, key, value, call.outputs[0], batch=math.prod(query.shape[:-3]), heads=heads,
            kv_heads=kv_heads, queries=queries, keys=keys, depth=depth, value_depth=width, density=density,
            extra=[mask] if mask is not None else (), target=call.target,
        )  # fmt: skip
