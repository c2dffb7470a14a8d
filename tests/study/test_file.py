from pathlib import Path

import pytest
import yaml

from bitwright.core.errors import InputError
from bitwright.study.file import load_study, parse_study

STUDY = Path(__file__).parents[2] / "studies" / "smollm2-int8.yaml"


@pytest.fixture
def data():
    return yaml.safe_load(STUDY.read_text())


def test_the_shipped_study_is_read_with_base_units():
    study = load_study(STUDY)
    assert study.buffer.capacity == 512 * 1024
    assert study.buffer.energy == pytest.approx(12.5e-12)
    assert [engine.processing_element for engine in study.engines] == ["multiply-accumulate", "compressed-accumulation"]


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("buffer", "capacity"), "512 ms", "buffer.capacity.*'512 ms'"),
        (("buffer", "capacity"), 512, "no unit"),
        (("buffer", "energy"), "0 pJ/B", "greater than zero"),
        (("model", "nmae"), "x", "model.nmae: unknown key; known here: formats, name"),
        (("modle",), 1, "modle: unknown key; known here: buffer"),
        (("workload", "prompt"), 0, "workload.prompt"),
        (("model", "formats"), ["int3"], "model.formats"),
        (("engines",), [], "engines"),
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
