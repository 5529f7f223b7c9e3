"""Faults: never a traceback, never a damaged or missing previous file, never a silent partial load."""

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

from aim_surgery.checkpoint.inspect import inspect
from aim_surgery.checkpoint.models import build
from aim_surgery.checkpoint.read import open_source, read_state_dict, tensors_of
from aim_surgery.checkpoint.write import load, save
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
        dcp.save(net().state_dict(), checkpoint_id=str(path.parent), no_dist=True)


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
}


def made(name: str) -> tuple[Path, Path]:
    """A file of a kind, and what is opened to read it."""
    path = Path(name)
    path.parent.mkdir(exist_ok=True)
    KINDS[name][0](path)
    return path, path.parent if name.startswith("dcp") else path


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
    for _ in range(SEEDS if not name.endswith("pt2") else SEEDS // 5):
        at, flip = rng.randrange(len(whole)), rng.randrange(1, 256)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :])
        try:
            undetected += not same(read(opened), expected)
        except AimSurgeryError as err:
            errors += 1
            assert "\n" not in " ".join(str(err).split())
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

WRITER = """
import sys, torch
import aim_surgery
from torch import nn
from aim_surgery.checkpoint import safetensors_out, torch_out
import time

gm = aim_surgery.transform(nn.Sequential(nn.Linear(400, 400), nn.Linear(400, 400)))
with torch.no_grad():
    for p in gm.parameters():
        p.fill_(float(sys.argv[2]))
for module in (safetensors_out, torch_out):  # as slow as a large file
    def slowly(*args, plain=module.bytes_of):
        time.sleep(0.004)
        return plain(*args)
    module.bytes_of = slowly
print("ready", flush=True)
while True:
    aim_surgery.save(gm, sys.argv[1])
"""


def start_writer(path: str, value: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", WRITER, path, str(value)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    return writer


def stop(writer: subprocess.Popen[str]) -> None:
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    assert writer.stdout is not None
    writer.stdout.close()


def values_in(path: str) -> set[float]:
    found: set[float] = set()
    for value in tensors_of(open_source(path)).values():
        found |= set(value.flatten().tolist())
    return found


def test_killed_at_20_random_moments_while_writing(folder):
    """A process forks off a writer each time, so that torch is imported once."""
    aim = torch.nn.Sequential(torch.nn.Linear(400, 400), torch.nn.Linear(400, 400))
    import aim_surgery

    gm = aim_surgery.transform(aim)
    rng = random.Random(0)
    for path in ("o.safetensors", "o.pt"):
        with torch.no_grad():
            for parameter in gm.parameters():
                parameter.fill_(0.0)
        save(gm, path)
        partial = 0
        for moment in range(20):
            with torch.no_grad():
                for parameter in gm.parameters():
                    parameter.fill_(float(moment + 1))
            child = os.fork()
            if child == 0:
                with contextlib.suppress(BaseException):
                    _write_forever(gm, path)
                os._exit(0)
            time.sleep(rng.uniform(0.0, 0.06))
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            partial += len(list(Path().glob(f".{path}.*.tmp"))) > 0
            values = values_in(path)
            assert len(values) == 1, values
            assert values.pop() in range(moment + 2)
            for left in Path().glob(f".{path}.*.tmp"):
                os.utime(left, (0, 0))  # an hour later
        assert partial > 0  # some were killed in the middle
        save(gm, path)
        assert not list(Path().glob(".*.tmp"))  # and what they left is gone


def _write_forever(gm: torch.nn.Module, path: str) -> None:
    from aim_surgery.checkpoint import safetensors_out, torch_out

    plain = safetensors_out.bytes_of

    def slowly(*args):
        time.sleep(0.002)  # as a large file would take
        return plain(*args)

    safetensors_out.bytes_of = torch_out.bytes_of = slowly
    while True:
        save(gm, path)


def test_two_processes_write_the_same_file(folder):
    writers = [start_writer("o.safetensors", value) for value in (1.0, 2.0)]
    try:
        deadline = time.monotonic() + 20
        while not Path("o.safetensors").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        seen = set()
        for _ in range(30):
            with contextlib.suppress(CheckpointError):  # replaced while it was read, and said so
                values = values_in("o.safetensors")
                assert values in ({1.0}, {2.0})
                seen |= values
            time.sleep(0.01)
    finally:
        for writer in writers:
            stop(writer)
    assert seen
    assert values_in("o.safetensors") in ({1.0}, {2.0})


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
