"""Machine files: what a good one gives, and the one clear error for everything that can be wrong in one."""

import pytest
import yaml

from bitwright.core import machine as machines
from bitwright.core.errors import InputError, UnknownNameError
from bitwright.core.quantity import Evidence

MINIMAL = """
name: small
devices:
  gpu:
    clock: 1.5 GHz
    compute:
      matrix: {fp16: 100 TFLOP/s, int8: 200 TOP/s}
    memories:
      hbm: {capacity: 80 GiB, bandwidth: {value: 2.0 TB/s, source: "measured by me", evidence: executed}}
sources:
  devices.gpu: "the datasheet"
  devices.gpu.clock: {source: "a guess", evidence: predicted}
"""


def load(text, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    return machines.load_machine(path)


def test_figures_are_in_si_units_with_source_and_evidence(tmp_path):
    machine = load(MINIMAL, tmp_path)
    gpu = machine.device()
    assert gpu.compute.matrix["fp16"].value == 100e12
    assert gpu.compute.matrix["int8"].unit == "OP/s"
    assert gpu.main_memory.capacity.value == 80 * 2**30
    assert gpu.main_memory.bandwidth.source == "measured by me"
    assert gpu.main_memory.bandwidth.evidence is Evidence.EXECUTED
    assert gpu.main_memory.capacity.source == "the datasheet"  # covered by the path above it
    assert (gpu.clock.source, gpu.clock.evidence) == ("a guess", Evidence.PREDICTED)  # the longest path wins


@pytest.mark.parametrize("name", [name for name in machines.list_machines() if name != machines.THIS_MACHINE])
def test_every_preset_loads_with_a_source_per_figure_and_survives_writing(name):
    machine = machines.load_machine(name)
    rows = machine.describe()
    assert rows
    assert all(row["source"] and row["evidence"] for row in rows)
    again = machines.machine_from_data(yaml.safe_load(machine.to_yaml()), "written")
    assert list(again.figures()) == list(machine.figures())
    assert again.name == name == machine.name


@pytest.mark.parametrize(
    ("name", "fmt", "per_clock_and_core"),
    # FLOP per clock and core, from the architecture whitepapers: independent of the totals in the files
    [("a100-40g", "fp16", 2048), ("h100-sxm", "fp16", 4096), ("v100-32g", "fp16", 1024), ("rtx-4090", "fp16", 512),
     ("a6000", "fp16", 1024), ("mi250x", "fp16", 1024)],
)  # fmt: skip
def test_matrix_rates_are_cores_times_clock_times_units(name, fmt, per_clock_and_core):
    gpu = machines.load_machine(name).device()
    assert gpu.compute.matrix[fmt].value == pytest.approx(
        gpu.cores.value * gpu.clock.value * per_clock_and_core, rel=0.01
    )


def test_presets_are_built_from_other_presets():
    a100, dgx = machines.load_machine("a100-80g"), machines.load_machine("dgx-a100")
    assert dgx.device_count == 8
    assert dgx.device().compute == a100.device().compute
    assert dgx.device().main_memory.bandwidth.value == pytest.approx(2.039e12)
    assert machines.load_machine("a100-40g").device().main_memory.bandwidth.value == pytest.approx(1.555e12)
    assert machines.load_machine("dgx-a100-cluster").device_count == 128


@pytest.mark.parametrize(
    ("old", "new", "parts"),
    [
        ("clock: 1.5 GHz", "clokc: 1.5 GHz", ["devices.gpu.clokc", "unknown key"]),
        ("clock: 1.5 GHz", "clock: 1.5 GB", ["devices.gpu.clock", "1.5 GB", "GHz"]),
        ("clock: 1.5 GHz", "clock: 1.5", ["devices.gpu.clock", "no unit"]),
        ("clock: 1.5 GHz", "clock: -1.5 GHz", ["devices.gpu.clock", "negative"]),
        ("clock: 1.5 GHz", "clock: [1, 2]", ["devices.gpu.clock", "expected a figure"]),
        ("clock: 1.5 GHz", "clock: .nan", ["devices.gpu.clock"]),
        ("capacity: 80 GiB, ", "", ["devices.gpu.memories.hbm.capacity", "missing"]),
        ("100 TFLOP/s", "100 TB/s", ["devices.gpu.compute.matrix", "fp16", "FLOP/s"]),
        ("100 TFLOP/s", "0 TFLOP/s", ["fp16", "greater than zero"]),
        ("int8: 200 TOP/s", "int8: 200 TFLOP/s", ["int8", "OP/s"]),
        (', source: "measured by me"', "", ["hbm.bandwidth", "source"]),
        ("evidence: executed", "evidence: dreamt", ["hbm.bandwidth", "dreamt", "executed"]),
        ('devices.gpu: "the datasheet"', 'devices.cpu: "the datasheet"', ["no source", "sources"]),
        ("devices.gpu.clock: {", "devices.gpu.clocks: {", ["devices.gpu.clocks", "no figure"]),
        ('"the datasheet"', '""', ["sources.devices.gpu", "empty"]),
        ("name: small", "nodes: 2\nname: small", ["network"]),
        ("name: small", "name: [", ["line"]),
        ("gpu:\n    clock", "gpu:\n    preset: nothing\n    clock", ["nothing", "a100-40g"]),
    ],
)  # fmt: skip
def test_one_clear_error_names_the_file_and_the_key(old, new, parts, tmp_path):
    assert old in MINIMAL
    with pytest.raises(InputError) as caught:
        load(MINIMAL.replace(old, new, 1), tmp_path)
    message = str(caught.value)
    assert "Traceback" not in message
    assert "\n" not in message.strip()
    for part in parts:
        assert part in message
    if "preset" not in new:
        assert "m.yaml" in message


def test_unknown_missing_and_unreadable_machines(tmp_path, monkeypatch):
    with pytest.raises(UnknownNameError, match=r"Did you mean 'a100-40g'.*rtx-4090"):
        machines.load_machine("a100-40")
    with pytest.raises(InputError, match="Cannot read the machine file"):
        machines.load_machine(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(InputError, match="not a text file"):
        machines.load_machine(tmp_path / "binary.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(InputError, match="expected a mapping"):
        machines.load_machine(tmp_path / "list.yaml")
    loop = tmp_path / "loop.yaml"
    loop.write_text(f"name: loop\npreset: {loop}\n")
    with pytest.raises(InputError, match="leads back to itself"):
        machines.load_machine(loop)
    monkeypatch.setenv("BITWRIGHT_DATA", str(tmp_path))
    with pytest.raises(InputError, match="bitwright machine measure"):
        machines.load_machine("this-machine")


def test_memory_presets_have_sources():
    for name, preset in machines.memory_presets().items():
        assert preset.bandwidth.source, name
        assert preset.energy.source, name
    ddr4 = machines.memory_preset("ddr4-3200")
    assert ddr4.bandwidth.value == 3200e6 * 64 / 8
    assert ddr4.energy.value * 8 == pytest.approx(1300e-12, rel=0.01)  # J/B * 8 B: the 1300 pJ per 64 bits cited
    with pytest.raises(UnknownNameError, match="lpddr5"):
        machines.memory_preset("lpddr9")
