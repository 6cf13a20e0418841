"""The doctor on machines that we pretend to have."""

import importlib.metadata
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import jax
import pytest

from jaxrl_dist.running import doctor


class Machine:
    """A machine under test: what hardware it has, what JAX was asked for and what JAX uses."""

    def __init__(self, patch: pytest.MonkeyPatch, folder):
        self.patch, self.folder = patch, folder
        patch.setattr(doctor, "_DEVICE_FILES", folder)
        for name in (*doctor._TPU_VARIABLES, "CUDA_VISIBLE_DEVICES"):
            patch.delenv(name, raising=False)
        patch.setenv("XDG_CACHE_HOME", str(folder))
        self.settings = {
            "jax_platforms": None,
            "jax_default_matmul_precision": None,
            "jax_enable_x64": False,
            "jax_compilation_cache_dir": None,
            "jax_enable_compilation_cache": True,
        }
        patch.setattr(jax, "config", SimpleNamespace(**self.settings, update=self.update))
        self.uses("cpu")

    def update(self, name: str, value) -> None:
        assert name in self.settings
        setattr(jax.config, name, value)

    def uses(self, platform: str) -> None:
        self.patch.setattr(jax, "default_backend", lambda: platform)
        self.patch.setattr(jax, "devices", lambda: [SimpleNamespace(device_kind=f"a {platform}")] * 2)

    def cannot_start(self, error: Exception) -> None:
        def fail():
            raise error

        self.patch.setattr(jax, "default_backend", fail)

    def has_gpu(self) -> None:
        for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
            (self.folder / name).touch()


@pytest.fixture
def machine(monkeypatch, tmp_path):
    return Machine(monkeypatch, tmp_path)


def run_main(capsys) -> tuple[int, str]:
    status = doctor.main()
    return status, capsys.readouterr().out


def test_all_is_well_on_a_machine_without_accelerator(machine, capsys):
    status, text = run_main(capsys)
    assert status == 0
    assert text.rstrip().endswith("no problems found")
    assert "PROBLEM" not in text
    rows = {line.split()[0]: line for line in text.splitlines() if line.startswith("  ")}
    assert jax.__version__ in rows["jax"]
    for name in ("numpy", "flax", "optax", "gymnax", "six"):
        assert importlib.metadata.version(name) in rows[name]
        assert ">=" in rows[name]
    assert "pytest" not in rows  # extras are nobody's duty
    assert "cpu, 2 devices: a cpu" in text
    assert "default" in next(line for line in text.splitlines() if "matmul precision" in line)
    assert next(line for line in text.splitlines() if "compile cache" in line).endswith("compiled, empty")


def test_an_unused_gpu_is_loud(machine, capsys):
    machine.has_gpu()
    status, text = run_main(capsys)
    assert status == 1
    problem = [line for line in text.splitlines() if line.startswith("PROBLEM: ")]
    assert len(problem) == 1
    assert "NVIDIA GPU (nvidia0, nvidia1) is on this machine, but JAX uses cpu" in problem[0]
    assert "jax[cuda" in problem[0]
    machine.uses("gpu")
    assert run_main(capsys)[0] == 0


@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_hidden_gpu_is_not_missed(machine, monkeypatch, hidden):
    machine.has_gpu()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert len(doctor.problems()) == 1
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert doctor.problems() == []


def test_a_gpu_left_alone_on_request_is_no_problem(machine):
    machine.has_gpu()
    jax.config.jax_platforms = "cpu"
    assert doctor.problems() == []
    assert "cpu" in next(line for line in doctor.report().splitlines() if "asked for" in line)


@pytest.mark.parametrize("sign", [*doctor._TPU_VARIABLES, "accel0"])
def test_an_unused_tpu_is_loud(machine, monkeypatch, sign):
    if sign == "accel0":
        (machine.folder / sign).touch()
    else:
        monkeypatch.setenv(sign, "0")
    (problem,) = doctor.problems()
    assert f"TPU ({sign})" in problem
    assert "jax[tpu]" in problem
    machine.uses("tpu")
    assert doctor.problems() == []


def test_versions_out_of_bounds_and_missing(machine, monkeypatch, capsys):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "six":
            raise importlib.metadata.PackageNotFoundError(name)
        return {"jax": "0.9.2", "flax": "0.13.0"}.get(name) or real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    status, text = run_main(capsys)
    assert status == 1
    found = [line for line in text.splitlines() if line.startswith("PROBLEM: ")]
    assert len(found) == 3
    assert found[0].startswith("PROBLEM: jax 0.9.2, but ")
    assert "<0.12" in found[0]
    assert found[1].startswith("PROBLEM: flax 0.13.0, but ")
    assert found[2].startswith("PROBLEM: six is missing, but >=1.16")


def test_not_installed_is_a_problem_and_no_crash(machine, monkeypatch, capsys):
    def requires(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    status, text = run_main(capsys)
    assert status == 1
    assert "PROBLEM: jaxrl-dist is not installed" in text


def test_settings_are_shown(machine, tmp_path):
    jax.config.jax_default_matmul_precision = "highest"
    jax.config.jax_compilation_cache_dir = str(tmp_path)
    (tmp_path / "jit_advance-0-cache").write_bytes(bytes(2**20))
    jax.config.jax_enable_x64 = True
    text = doctor.report()
    assert "highest" in text
    assert f"{tmp_path}, 1 program(s), 1.0 MiB; `rm -r {tmp_path}` empties it" in text
    assert next(line for line in text.splitlines() if "64-bit" in line).endswith("on, but off while training")
    jax.config.jax_enable_compilation_cache = False
    assert next(line for line in doctor.report().splitlines() if "compile cache" in line).endswith("off")


def test_windows_is_refused_in_one_line(machine, monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(ValueError, match=r"^jaxrl_dist runs on Linux and macOS; Windows is not supported$"):
        doctor.require_platform("auto")
    status, text = run_main(capsys)
    assert status == 1
    assert "PROBLEM: jaxrl_dist runs on Linux and macOS; Windows is not supported" in text


def test_jax_that_cannot_start_is_reported(machine, capsys):
    jax.config.jax_platforms = "tpu"
    machine.cannot_start(RuntimeError("Unable to initialize backend 'tpu'\nand more"))
    status, text = run_main(capsys)
    assert status == 1
    assert "PROBLEM: JAX cannot start on 'tpu' (Unable to initialize backend 'tpu');" in text
    assert "jax[tpu]" in text
    with pytest.raises(ValueError, match=r"device='tpu': JAX cannot start on 'tpu'"):
        doctor.require_platform("tpu")
    machine.cannot_start(AssertionError())
    assert any("there is no such device" in problem for problem in doctor.problems())


def test_require_platform(machine):
    for used in ("cpu", "gpu", "tpu"):
        machine.uses(used)
        for asked in ("cpu", "gpu", "tpu"):
            if asked == used:
                assert doctor.require_platform(asked) == used
            else:
                with pytest.raises(ValueError, match=rf"^device='{asked}': JAX uses {used}; .+") as raised:
                    doctor.require_platform(asked)
                assert "\n" not in str(raised.value)
        jax.config.jax_platforms = None
        assert doctor.require_platform("auto") == used
    with pytest.raises(ValueError, match=r"device='cuda': must be one of auto, cpu, gpu, tpu"):
        doctor.require_platform("cuda")


def test_require_platform_auto_warns_of_an_unused_gpu(machine):
    machine.has_gpu()
    with pytest.warns(UserWarning, match="NVIDIA GPU .* but JAX uses cpu"):
        assert doctor.require_platform("auto") == "cpu"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert doctor.require_platform("cpu") == "cpu"  # that is what was asked for
        assert jax.config.jax_platforms == "cpu"
        machine.uses("gpu")
        jax.config.jax_platforms = None
        assert doctor.require_platform("auto") == "gpu"


def test_this_machine_for_real():
    """No pretending: a process of its own, first with what every machine has, then with what JAX cannot find."""
    program = [sys.executable, "-m", "jaxrl_dist.running.doctor"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    finished = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.rstrip().endswith("no problems found")
    environment["JAX_PLATFORMS"] = "no_such_platform"
    finished = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 1
    assert "PROBLEM: JAX cannot start on 'no_such_platform'" in finished.stdout
