from pathlib import Path

import pytest
import yaml

from bitwright.core.errors import InputError
from bitwright.engine.notation import parse_nest
from bitwright.study.exploration import load_exploration
from bitwright.study.file import describe_engine, load_study, parse_study

STUDY = Path(__file__).parents[2] / "studies" / "smollm2-int8.yaml"


@pytest.fixture
def data():
    return yaml.safe_load(STUDY.read_text())


def test_the_shipped_study_is_read_with_base_units():
    study = load_study(STUDY)
    assert study.buffer.capacity == 512 * 1024
    assert study.buffer.energy == pytest.approx(12.5e-12, rel=1e-9, abs=0)
    assert [engine.transformations for engine in study.engines] == [(), ("opt1",)]
    assert all(describe_engine(engine, study.model).rows == 16 for engine in study.engines)


def test_every_shipped_study_is_valid():
    paths = sorted(STUDY.parent.glob("*.yaml"))
    assert STUDY in paths
    for path in paths:
        load_exploration(path) if path.name.startswith("explore-") else load_study(path)


def test_an_engine_takes_its_shape_from_its_dataflow_and_its_widths_from_operand_bits(data):
    data["engines"] = [
        {"name": name, "dataflow": name, "operand_bits": 10, "b_bits": 12, "columns": 8}
        for name in ("os", "ws", "cube", "tree", "matrix2d")
    ]
    study = parse_study(data)
    engines = [describe_engine(section, study.model) for section in study.engines]
    assert [(engine.rows, engine.depth) for engine in engines] == [(16, 1), (1, 16), (4, 4), (1, 16), (16, 1)]
    assert {(engine.a_bits, engine.b_bits, engine.columns) for engine in engines} == {(10, 12, 8)}


def test_an_illegal_sequence_shows_the_rule_and_the_nest_before_it(data):
    data["engines"][1]["transformations"] = ["opt1", "roll bw", "hoist_shift"]
    with pytest.raises(InputError) as caught:
        parse_study(data, "mine.yaml")
    message = str(caught.value)
    assert message.startswith("mine.yaml, engine 'compressed': Rule 2")
    assert "`hoist_shift`" in message
    nest = message[message.index("nest ") :]
    assert "for bw in 4:" in nest, "rolled, but not hoisted"
    assert parse_nest(nest).loop("bw").spatial is False
    assert "acc_s, acc_c = half_reduce(pp" in nest


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("buffer", "capacity"), "512 ms", "buffer.capacity.*'512 ms'"),
        (("buffer", "capacity"), 512, "no unit"),
        (("buffer", "energy"), "0 pJ/B", "greater than zero"),
        (("model", "nmae"), "x", "model.nmae: unknown key; known here: formats, name"),
        (("modle",), 1, "modle: unknown key; known here: buffer"),
        (("workload", "prompt"), 0, "workload.prompt"),
        (("model", "formats"), ["posit8"], "model.formats.0.*Unknown number format 'posit8'.*fp32 and int8"),
        (("model", "formats"), ["int4/row", "int4/row"], "given twice: int4/row"),
        (("model", "formats"), [{"name": "int8", "weights": "int4/32"}], "the name int8 is taken"),
        (
            ("model", "formats"),
            [{"name": "a", "wights": "int4/32"}],
            "model.formats.0.wights: unknown key; known here: accumulation",
        ),
        (("model", "formats"), [{"name": "a", "keys": "int8/tensor"}], "model.formats.0.*cache grows"),
        (("engines", 0, "formats"), "mxfp4", "engine 'mac': formats 'mxfp4' are not among model.formats: int8, fp32"),
        (("engines", 0, "formats"), "fp32", "engine 'mac'.*leave weights, activations, keys"),
        (("engines",), [], "engines"),
        (("engines", 0, "dataflow"), "output-stationary", "engines.0.dataflow.*'os', 'ws'"),
        (("engines", 0, "transformations"), ["op1"], "engine 'mac'.*'op1'.*Did you mean 'opt1'"),
        (("engines", 0, "transformations"), ["pipeline nothing"], "engine 'mac'.*'nothing'"),
        (("engines", 0, "transformations"), "opt1", "transformations: should be a list"),
        (("engines", 0, "encoding"), "boot", "engine 'mac'.*'boot'.*mbe"),
        (("engines", 0, "depth"), 4, "engine 'mac'.*depth is 1, not 4"),
        (("engines", 0, "operand_bits"), 4, "operand_bits.*8"),
        (("engines", 0, "nest"), "mine.txt", "engine transform"),
        (("engines", 0, "processing_element"), "compressed-accumulation", r"\[opt1\]"),
    ],
)
def test_bad_entries_are_named(data, place, value, message):
    target = data
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    with pytest.raises(InputError, match=message):
        parse_study(data, "study.yaml")


def test_two_engines_of_one_name_are_refused(data):
    data["engines"][1]["name"] = data["engines"][0]["name"]
    with pytest.raises(InputError, match="same name"):
        parse_study(data)


@pytest.mark.parametrize("content", ["title: [", "- 1\n- 2\n", "", "\x00"])
def test_what_is_not_a_study_is_refused(tmp_path, content):
    path = tmp_path / "study.yaml"
    path.write_text(content)
    with pytest.raises(InputError, match=r"study\.yaml"):
        load_study(path)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match="Cannot read"):
        load_study(tmp_path / "none.yaml")


def formats_of(data, entry, **engine):
    data["model"]["formats"] = [entry]
    name = entry if isinstance(entry, str) else entry["name"]
    data["engines"] = [{"name": "one", "columns": 4, "formats": name, **engine}]
    return data


W4A8 = {"name": "w4a8", "weights": "int4/32", "activations": "int8/row", "keys": "int4/32", "values": "int4/32",
        "attention": "int8/row"}  # fmt: skip


def test_a_format_decides_the_multiplier_and_the_widths(data):
    study = parse_study(formats_of(data, "mxfp4", dataflow="ws"))
    engine = describe_engine(study.engines[0], study.model)
    assert (engine.multiplier, engine.a_bits, engine.b_bits) == ("fp4_e2m1", 4, 4)
    # codes up to 12 in units of a half: 2048 products of 144
    assert engine.accumulator_bits == (2048 * 144).bit_length() + 1
    study = parse_study(formats_of(data, "lmul_e4m3/row"))
    assert describe_engine(study.engines[0], study.model).multiplier == "lmul_e4m3"
    study = parse_study(formats_of(data, W4A8))
    assert describe_engine(study.engines[0], study.model).multiplier == "int8*int4"
    study = parse_study(formats_of(data, {**W4A8, "keys": "int8/row"}, multiplier="booth", transformations=["opt1"]))
    engine = describe_engine(study.engines[0], study.model)
    assert (engine.multiplier, engine.a_bits, engine.transformations) == ("booth", 8, ("opt1",))


@pytest.mark.parametrize(
    ("entry", "engine", "message"),
    [
        ({**W4A8, "keys": "int8/row"}, {}, "does one product.*several.*keys int8/row: int8;.*multiplier: booth"),
        ({**W4A8, "attention": "mxfp8_e4m3", "keys": "ovp8/row"}, {}, "no product.*keys ovp8/row"),
        ({"name": "w", "weights": "int4/32"}, {}, "leave activations, keys, values, attention in floating point"),
        ("mxfp4", {"multiplier": "booth"}, "multiplies integers of 8 x 8 bits.*are fp4_e2m1 codes"),
        ("bipolar8/row", {"multiplier": "tool"}, "are int9 codes"),
        ({**W4A8, "activations": "uint4/32", "attention": "uint4/32"}, {}, "no product.*activations uint4/32"),
        ("mxfp4", {"encoding": "csd", "a_bits": 8}, "a_bits, encoding belong to integer multipliers"),
        ("fp8_e5m2/row", {}, "no product of the codes of activations fp8_e5m2/row"),
    ],
)
def test_formats_an_engine_cannot_take_are_refused(data, entry, engine, message):
    with pytest.raises(InputError, match=f"engine 'one': .*{message}"):
        parse_study(formats_of(data, entry, **engine))
