"""Faults: no traceback, no damaged or missing previous file, no silent partial load."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

import aim_surgery
from aim_surgery.checkpoint.inspect import inspect
from aim_surgery.checkpoint.load import load
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.reading.kinds import open_source, read_state_dict, tensors_of
from aim_surgery.checkpoint.save import save
from aim_surgery.errors import AimSurgeryError, CheckpointError
from tests.test_files_in import FACTORY, net
from tests.test_files_out import run

SPEC = "nets.py:Net"
SEEDS = 1000


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("nets.py").write_text(FACTORY)
    torch.save(net().state_dict(), "net.pt")
    return tmp_path


# Damage -------------------------------------------------------------------------------------


def _write_index(path: Path) -> None:
    safetensors.torch.save_file(net().state_dict(), path.parent / "shard.safetensors")
    names = "".join(f'"{name}": "shard.safetensors", ' for name in net().state_dict())
    path.write_text(f'{{"weight_map": {{{names[:-2]}}}}}')


def _write_operated(path: Path) -> None:
    assert run("transform", "net.pt", "--model", SPEC, "-o", str(path)).exit_code == 0


def _write_dcp(path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.state_dict_saver.save(net().state_dict(), checkpoint_id=str(path.parent), no_dist=True)


def _write_program(path: Path) -> None:
    program = torch.export.export(net().eval(), (torch.randn(2, 3, 12, 12),))
    torch.export.save(program, path)


# How each kind is written; how much of the damage must be seen, and what can't be
KINDS = {
    "ours.safetensors": (_write_operated, "all"),
    "ours.pt": (_write_operated, "all"),
    "zip.pt": (lambda path: torch.save(net().state_dict(), path), "all"),
    "legacy.pt": (
        lambda path: torch.save(net().state_dict(), path, _use_new_zipfile_serialization=False),
        "structure",
    ),
    "theirs.safetensors": (
        lambda path: safetensors.torch.save_file(net().state_dict(), path),
        "structure",
    ),
    "x.index.json": (_write_index, "structure"),
    "program.pt2": (_write_program, "all"),
    "dcp/__0_0.distcp": (_write_dcp, "all"),
    "dcp/.metadata": (_write_dcp, "structure"),
    "ours.index.json": (_write_operated, "all"),
    "ours.dcp/__0_0.distcp": (lambda path: _write_operated(path.parent), "all"),
    "ours.dcp/aim_surgery.json": (lambda path: _write_operated(path.parent), "all"),
}


def made(name: str) -> tuple[Path, Path]:
    """A file of a kind, and what is opened to read it."""
    path = Path(name)
    if name.startswith("dcp"):
        path.parent.mkdir()
    KINDS[name][0](path)
    return path, path if path.parent == Path() else path.parent


def read(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, and all that it tells, as the commands read them."""
    with contextlib.suppress(CheckpointError):
        inspect(path).to_text(keys=True)
    source = open_source(path)
    found = tensors_of(source)
    if "aim_surgery.plan" in source.metadata:
        found["plan"] = torch.frombuffer(
            bytearray(source.metadata["aim_surgery.plan"].encode()), dtype=torch.uint8
        )
    return found


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return sorted(one) == sorted(other) and all(
        one[n].dtype == v.dtype
        and one[n].shape == v.shape
        and bool(
            (one[n].view(torch.uint8) == v.view(torch.uint8)).all()
            if v.ndim
            else ((one[n] == v) | (one[n].isnan() & v.isnan()))
        )
        for n, v in other.items()
    )


@pytest.mark.parametrize("name", KINDS)
def test_cut_short_at_every_percent(folder, name):
    path, opened = made(name)
    whole, expected = path.read_bytes(), read(opened)
    for percent in range(100):
        path.write_bytes(whole[: len(whole) * percent // 100])
        with pytest.raises(AimSurgeryError) as caught:
            read(opened)
        assert str(opened) in str(caught.value), percent
    path.write_bytes(whole)
    assert same(read(opened), expected)


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bytes(folder, name):
    """1,000 files with one flipped byte: an error, or all as it was; nothing else is raised.

    Formats without checksums can't tell a flipped bit in a value. There, no more than a value, or a
    name or shape that a comparison with the model sees, may have changed.
    """
    path, opened = made(name)
    whole, expected = path.read_bytes(), read(opened)
    errors, undetected = 0, 0
    rng = random.Random(0)
    for _ in range(SEEDS):
        at, flip = rng.randrange(len(whole)), rng.randrange(1, 256)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        try:
            undetected += not same(read(opened), expected)
        except AimSurgeryError:
            errors += 1
    assert errors > 0
    if KINDS[name][1] == "all":
        assert undetected == 0


def test_a_flipped_byte_of_a_value_is_told_where_it_is(folder):
    _write_operated(Path("o.safetensors"))
    source = open_source("o.safetensors")
    raw = bytearray(Path("o.safetensors").read_bytes())
    raw[source.begins["3.weight"] + 5] ^= 1  # pyright: ignore[reportAttributeAccessIssue]
    Path("o.safetensors").write_bytes(raw)
    result = run("verify", "net.pt", "o.safetensors", "--model", SPEC)
    assert result.exit_code == 1
    assert "damaged (3.weight does not match its checksum" in result.stderr


def test_a_file_that_is_changed_while_it_is_read(folder):
    safetensors.torch.save_file(net().state_dict(), "c.safetensors")
    source = open_source("c.safetensors")
    safetensors.torch.save_file(net(width=4).state_dict(), "c.safetensors")
    with pytest.raises(CheckpointError, match="has been changed while it was read"):
        source.tensor("0.weight")


def test_a_record_that_is_marked_as_a_folder(folder):
    """PyTorch's reader gives memory that nobody has written for it."""
    raw = Path("net.pt").read_bytes()
    with zipfile.ZipFile("net.pt") as archive:
        at = raw.index(b"PK\x01\x02", archive.start_dir) + 38
    Path("net.pt").write_bytes(raw[:at] + b"\x10" + raw[at + 1 :])
    with pytest.raises(CheckpointError, match="is marked as no file"):
        read_state_dict("net.pt")


def test_records_without_checksums_are_read(folder):
    before = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(net().state_dict(), "c.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert len(read_state_dict("c.pt")) == 9


def test_a_record_that_the_directory_leaves_out_is_missed(folder):
    with zipfile.ZipFile("net.pt") as archive:
        records = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile("less.pt", "w") as archive:
        for record, raw in records.items():
            if not record.endswith("data/1"):
                archive.writestr(record, raw)
    with pytest.raises(CheckpointError, match="cut short, damaged"):
        read_state_dict("less.pt")


# Writing ------------------------------------------------------------------------------------


def values_in(path: str) -> set[float]:
    found: set[float] = set()
    for value in tensors_of(open_source(path)).values():
        found |= set(value.flatten().tolist())
    return found


def operated(value: float) -> torch.nn.Module:
    layers = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))
    return filled(aim_surgery.transform(layers), value)


def filled(gm: torch.nn.Module, value: float) -> torch.nn.Module:
    with torch.no_grad():
        for parameter in gm.parameters():
            parameter.fill_(value)
    return gm


def start_writer(gm: torch.nn.Module, path: str) -> int:
    """A process that writes a file again and again."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            _write_forever(gm, path)
        os._exit(1)
    return child


def kill(child: int) -> None:
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)  # it was still at it


@pytest.mark.parametrize("path", ["o.safetensors", "o.pt", "o.index.json"])
def test_killed_at_20_random_moments_while_writing(folder, path):
    gm = operated(0.0)
    save(gm, path)
    rng = random.Random(0)
    partial = 0
    for moment in range(1, 21):
        child = start_writer(filled(gm, float(moment)), path)
        time.sleep(rng.uniform(0.0, 0.06))
        kill(child)
        left = list(Path().glob(f".{path}.*.tmp"))
        partial += bool(left)
        values = values_in(path)
        assert len(values) == 1
        assert values.pop() in range(moment + 1)
        for file in left:
            os.utime(file, (0, 0))  # later
    assert partial > 0  # some were killed in the middle
    save(gm, path)
    assert not list(Path().glob(".*.tmp"))  # and what they left is gone


def _write_forever(gm: torch.nn.Module, path: str) -> None:
    from aim_surgery.checkpoint.writing import safetensors_file, torch_file

    plain = safetensors_file.bytes_of

    def slowly(*args):
        time.sleep(0.002)  # as a large file would take
        return plain(*args)

    safetensors_file.bytes_of = torch_file.bytes_of = slowly
    while True:
        save(gm, path)


def test_a_folder_is_whole_or_not_there_at_20_random_moments(folder):
    gm, partial, whole = operated(3.0), 0, 0
    rng = random.Random(0)
    for moment in range(20):
        path = Path(f"o{moment}.dcp")
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                _write_slowly(gm, path)
            os._exit(1)
        time.sleep(rng.uniform(0.0, 0.4))
        kill(child)
        left = list(Path().glob(f".{path}.*.tmp"))
        partial += bool(left and list(left[0].glob("whole/*.distcp")))
        if path.exists():
            whole += 1
            assert values_in(str(path)) == {3.0}
        for file in left:
            os.utime(file, (0, 0))  # later
        if not path.exists():
            save(gm, path)
        assert not list(Path().glob(f".{path}.*.tmp"))
    assert partial > 0  # some were killed in the middle
    assert whole > 0


def _write_slowly(gm: torch.nn.Module, path: Path) -> None:
    from aim_surgery.checkpoint.writing import dcp_folder

    plain = dcp_folder._Planner.transform_object

    def slowly(self, write_item, object):
        time.sleep(0.01)  # as a large tensor would take
        return plain(self, write_item, object)

    dcp_folder._Planner.transform_object = slowly
    save(gm, path)
    time.sleep(60)


@pytest.mark.parametrize("path", ["o.safetensors", "o.pt"])
def test_two_processes_write_the_same_file(folder, path):
    save(operated(1.0), path)
    writers = [start_writer(operated(value), path) for value in (1.0, 2.0)]
    seen: set[float] = set()
    try:
        deadline = time.monotonic() + 20
        while seen != {1.0, 2.0} and time.monotonic() < deadline:
            with contextlib.suppress(CheckpointError):  # replaced while it was read, and said so
                values = values_in(path)
                assert values in ({1.0}, {2.0})
                seen |= values
    finally:
        for writer in writers:
            kill(writer)
    assert seen == {1.0, 2.0}
    assert values_in(path) in ({1.0}, {2.0})


@pytest.fixture
def small_disk(folder) -> Iterator[Path]:
    """A file system of 64 kB."""
    disk = folder / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield disk
    finally:
        subprocess.run(["umount", str(disk)], check=True)


ENDED = """
import os, signal, sys
from aim_surgery import cli
from aim_surgery.checkpoint.writing.atomic import replacing

def command():
    with replacing("o.safetensors", 1000):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

cli.app = command
cli.main()
"""


def test_a_scheduler_that_ends_the_command_leaves_nothing_behind(folder):
    before = sorted(Path().iterdir())
    ended = subprocess.run([sys.executable, "-c", ENDED], capture_output=True, timeout=60)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGTERM, b"")
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize("name", ["o.safetensors", "o.pt", "o.index.json"])
def test_a_full_disk(small_disk, name):
    assert run("transform", "net.pt", "--model", SPEC, "-o", f"disk/{name}").exit_code == 0
    before = {f.name: f.read_bytes() for f in small_disk.iterdir()}
    torch.save(build(SPEC, width=200).state_dict(), "large.pt")
    args = ("--model", SPEC, "--model-args", '{"width": 200}')
    result = run("transform", "large.pt", *args, "-o", f"disk/{name}")
    assert result.exit_code == 1
    assert "could not be written: No space left on device; the old file" in result.stderr
    assert result.stderr.count("\n") == 1
    assert {f.name: f.read_bytes() for f in small_disk.iterdir()} == before


def test_a_full_disk_holds_no_part_of_a_folder(small_disk):
    torch.save(build(SPEC, width=200).state_dict(), "large.pt")
    args = ("--model", SPEC, "--model-args", '{"width": 200}')
    result = run("transform", "large.pt", *args, "-o", "disk/o.dcp")
    assert result.exit_code == 1
    assert "could not be written: No space left on device" in result.stderr
    assert result.stderr.count("\n") == 1
    assert not list(small_disk.iterdir())


def test_a_folder_that_may_not_be_written(small_disk):
    # a mount: root may write anywhere else
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    result = run("transform", "net.pt", "--model", SPEC, "-o", "disk/o.safetensors")
    assert result.exit_code == 1
    assert "disk cannot be written: Read-only file system" in result.stderr
    assert not list(small_disk.iterdir())


def test_the_loaded_file_survives_being_replaced(folder):
    _write_operated(Path("o.pt"))
    gm = load("o.pt", SPEC)
    before = gm.get_parameter("3.weight").clone()
    _write_operated(Path("o.pt"))
    assert torch.equal(gm.get_parameter("3.weight"), before)
