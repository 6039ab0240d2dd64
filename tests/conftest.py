"""A strict session: warnings are errors (pyproject.toml), ranks are never promoted, two host devices by default."""

import atexit
import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time

# Set before jax is imported anywhere. A test that needs eight devices starts a process of its own.
os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Compiling is most of the time of this suite: programs are optimised little, and compiled once for all its processes.
# JAX_DISABLE_MOST_OPTIMIZATIONS=0 tests them as users run them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    compiled = tempfile.mkdtemp(prefix="marsjax-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = compiled
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, compiled, ignore_errors=True)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MiB. Mounting it needs root; without, the test is skipped and says so."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"mounting a small tmpfs needs root: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="session")
def bundle_folder(tmp_path_factory):
    """A bundle of `mars` on small planted data. Tests must not change it."""
    from marsjax import commands
    from tests.pipeline_test import small_config

    folder = tmp_path_factory.mktemp("served")
    # An encoder as it was drawn and one length of histories: what is tested is the serving, and this is quick.
    config = small_config(**{"alignment.epochs": "0", "ctr.buckets": "20"})
    commands.export(config, folder / "work", output=folder / "bundle")
    return folder / "bundle"


class RedisServer:
    """A real Redis that writes every command to the disk before it answers."""

    def __init__(self, folder):
        with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as free:
            self.port = free.getsockname()[1]
        self.folder, self.process = folder, None
        self.url = f"redis://127.0.0.1:{self.port}/0"

    def start(self):
        flags = ["--port", str(self.port), "--bind", "127.0.0.1", "--dir", str(self.folder), "--save", ""]
        flags += ["--appendonly", "yes", "--appendfsync", "always"]
        self.process = subprocess.Popen(["redis-server", *flags], stdout=subprocess.DEVNULL)
        for _ in range(500):
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 0.2) as line:
                line.sendall(b"PING\r\n")
                if line.recv(16).startswith(b"+PONG"):
                    return
            time.sleep(0.02)
        raise RuntimeError("redis-server did not come up")

    def stop(self):
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory):
    if shutil.which("redis-server") is None:
        pytest.skip("needs a redis-server on the PATH; `.ci/run` installs one")
    server = RedisServer(tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()
