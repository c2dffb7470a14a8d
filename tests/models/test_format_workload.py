"""Workloads and operand words of models in number formats, against packed bytes and executed layers."""

import numpy as np
import pytest
import torch

from bitwright.arithmetic import formats
from bitwright.core.errors import InputError
from bitwright.core.operators import Operand, attention
from bitwright.core.workload import Gemm, Kind, Operator, Role, Tensor, Workload
from bitwright.engine.format_products import operand_words, product_name, product_unit
from bitwright.engine.mapping import ScaleGroups
from bitwright.models.decoder import Decoder, DecoderConfig
from bitwright.models.format_execution import FormatAssignment, execute_in
from bitwright.models.format_workload import in_formats, scale_groups
from bitwright.models.operands import collect_words

CONFIG = DecoderConfig(vocabulary=40, hidden=64, layers=1, heads=4, kv_heads=2, head_dim=16, feed_forward=96)


@pytest.fixture(scope="module")
def model() -> Decoder:
    torch.manual_seed(3)
    return Decoder(CONFIG).eval()


@pytest.mark.parametrize("names", [("int4/32", "int8/row"), ("mxfp4", "mxfp4"), ("fp8_e4m3/row", "fp8_e4m3/row"),
                                   ("ovp4/row", "ovp4/row"), ("bipolar2/row", "int8/row"), ("shift5/row", "int8/row"),
                                   ("uint4/32", "int8/row"), ("bfp12_32", "bfp12_32"),
                                   ("lmul_e4m3/row", "lmul_e4m3/row")])  # fmt: skip
def test_words_times_scales_are_what_the_layer_computes(model: Decoder, names: tuple[str, str]) -> None:
    weights, activations = names
    ids = torch.randint(0, 40, (1, 7))
    assignment = FormatAssignment(weights, activations)
    layers = {layer.name: layer for layer in collect_words(model, assignment, ids, rows=99, columns=999)}
    forms = formats.parse(activations), formats.parse(weights)
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    twin = execute_in(model, assignment)
    for name in layers:
        twin.get_submodule(name).register_forward_hook(
            lambda layer, given, out, name=name: seen.update({name: (given[0], out)})
        )
    with torch.inference_mode():
        twin(ids)
    unit = product_unit(product_name(forms[0].operand, forms[1].operand) or "")
    for name, layer in layers.items():
        x, out = seen[name]
        left = forms[0].encode(x.reshape(-1, layer.k))
        weight = model.get_submodule(name).weight
        right = forms[1].encode(weight.detach().float())
        size = scale_groups(assignment).linear.k or layer.k
        total = np.zeros((layer.m, layer.n))
        for start in range(0, layer.k, size):
            part = slice(start, start + size)
            words_a, words_b = layer.activations[:, part].astype(np.int64), layer.weights[part].astype(np.int64)
            sums = unit.matmul(words_a, words_b) * 2.0 ** (unit.lsb - unit.a.lsb - unit.b.lsb)
            scale_a, scale_b = (np.repeat(each.scale.reshape(each.codes.shape[0], -1), layer.k, 1)
                                if each.scale.reshape(each.codes.shape[0], -1).shape[1] == 1
                                else np.repeat(each.scale, size, 1) for each in (left, right))  # fmt: skip
            if right.zero is not None:
                zero = right.zero if right.zero.shape[-1] == 1 else right.zero[:, [start // size]]
                sums -= words_a.sum(1)[:, None] * zero[:, 0][None]
            total += sums * scale_a[:, start][:, None] * scale_b[:, start][None]
        # units of the codes are in the scales already: the words are what codes mean
        assert np.allclose(total, out.reshape(layer.m, layer.n), rtol=1e-4, atol=1e-4 * np.abs(total).max())


def linear(m: int, n: int, k: int) -> Operator:
    return Operator(
        "fc", Kind.MATMUL, {"m": m, "n": n, "k": k},
        (Tensor("x", ({"m": 1}, {"k": 1})), Tensor("w", ({"n": 1}, {"k": 1}), role=Role.WEIGHT)),
        (Tensor("y", ({"m": 1}, {"n": 1})),),
    )  # fmt: skip


@pytest.mark.parametrize("name", ["int4/32", "int8/row", "mxfp4", "bfp12_32", "uint4/48", "fp8_e4m3/row"])
def test_weight_bytes_are_the_packed_ones(name: str) -> None:
    made = in_formats(Workload("one", (linear(3, 20, 144),)), FormatAssignment(name, "int8/row")).operators[0]
    form = formats.parse(name)
    packed = form.pack(form.encode(np.random.default_rng(1).normal(size=(20, 144)).astype(np.float32)))
    assert made.inputs[1].format == name
    assert made.inputs[1].bytes(made.loops) == pytest.approx(packed.nbytes, abs=1)
    assert made.inputs[0].bytes(made.loops) == pytest.approx(3 * (144 + 4))
    assert made.outputs[0].bytes(made.loops) == pytest.approx(3 * (20 + 4))


def test_keys_values_and_queries_have_formats_of_their_own() -> None:
    def cached(name: str) -> Operand:
        return Operand(name, (1, 2, 24, 64), role=Role.KV)

    one = attention(
        "attend", Operand("q", (1, 4, 8, 64)), cached("keys"), cached("values"), Operand("out", (1, 4, 8, 64)), batch=1,
        heads=4, kv_heads=2, queries=8, keys=24, depth=64, value_depth=64,
    )  # fmt: skip
    names = FormatAssignment("int4/32", "int8/row", "int4/32", "int8/row", "mxfp8_e4m3")
    made = in_formats(Workload("one", (one,)), names).operators[0]
    assert [tensor.format for tensor in made.inputs[:3]] == ["mxfp8_e4m3", "int4/32", "int8/row"]
    assert made.inputs[1].bits == 4 + 32 / 32
    assert made.inputs[2].bits == 8 + 32 / 64
    groups = scale_groups(names)
    assert (groups(made, 0), groups(made, 1)) == (ScaleGroups(k=32), ScaleGroups(k=32))
    assert groups(linear(1, 2, 3), 0) == ScaleGroups(k=32)


def test_groups_cut_a_product_into_parts() -> None:
    whole = Gemm(3, 5, 24, 70)
    assert ScaleGroups().parts(whole) == (whole,)
    assert ScaleGroups(k=32).parts(whole) == (Gemm(6, 5, 24, 32), Gemm(3, 5, 24, 6))
    assert ScaleGroups(k=128, n=8).parts(whole) == (Gemm(9, 5, 8, 70),)
    assert sum(part.macs for part in ScaleGroups(k=32, n=12).parts(whole)) == whole.macs


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(InputError, match=r"int4/32 and int8/48 do not divide"):
        scale_groups(FormatAssignment("int4/32", "int8/48"))


def test_words_need_two_operands_with_a_product(model: Decoder) -> None:
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(InputError, match="both operands"):
        collect_words(model, FormatAssignment("int4/32"), ids)
    form = formats.parse("ovp8/row")
    with pytest.raises(InputError, match="ovp8/row is no operand"):
        operand_words(form, form.encode(np.ones((2, 4), np.float32)))
