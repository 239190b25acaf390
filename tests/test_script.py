"""`./lora` itself, with an installer that only writes down what it was asked for."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Makes a virtual environment whose Python says how it was called.
FAKE_UV = """#!/bin/sh
echo "$@" >>"$CALLS"
if [ "$1" = venv ]; then
    for last; do :; done
    mkdir -p "$last/bin" "$last/lib/python3.11/site-packages"
    cat >"$last/bin/python" <<END
#!/bin/sh
case "\\$*" in
    *version_info*) exec "$REAL" "\\$@" ;;
    *) echo "ran \\$*" ;;
esac
END
    chmod +x "$last/bin/python"
fi
"""
# What unpacking Debian's package of pip leaves: one that "installs" the fake above.
FAKE_DPKG = """#!/bin/sh
mkdir -p usr/lib/python3/dist-packages/pip
cat >usr/lib/python3/dist-packages/pip/__main__.py <<'END'
import os, shutil, sys
if "--target" in sys.argv:
    target = sys.argv[sys.argv.index("--target") + 1]
    os.mkdir(f"{target}/bin")
    shutil.copy(os.environ["UV"], f"{target}/bin/uv")
END
"""


@pytest.fixture
def checkout(tmp_path):
    """A copy of the script and the pins in a folder whose name holds a space."""
    folder = tmp_path / "a folder"
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copy(ROOT / "lora", folder / "lora")
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(FAKE_UV)
    (tools / "uv").chmod(0o755)
    (tools / "python3").symlink_to(sys.executable)
    return folder


def lora(checkout: Path, *words: str, **extra: str) -> subprocess.CompletedProcess[str]:
    calls = checkout.parent / "calls"
    calls.write_text("")
    environment = {
        "PATH": f"{checkout.parent / 'tools'}:/usr/bin:/bin",
        "HOME": str(checkout.parent),
        "CALLS": str(calls),
        "REAL": sys.executable,
        "LORA_JAX_PLATFORM": "cpu",
        **extra,
    }
    return subprocess.run(
        ["sh", str(checkout / "lora"), *words],
        cwd=checkout.parent,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def calls(checkout: Path) -> str:
    return (checkout.parent / "calls").read_text()


def test_help_needs_no_set_up(checkout):
    run = lora(checkout, "--help")
    assert run.returncode == 0
    assert "./lora test" in run.stdout
    assert not (checkout / ".venv").exists()


def test_first_run_sets_up_and_the_second_is_silent(checkout):
    first = lora(checkout, "train", "my config.yaml")
    assert first.stdout == "ran -P -m lora_jax train my config.yaml\n"
    assert "installing JAX for cpu (LORA_JAX_PLATFORM says so)" in first.stderr
    assert "-r requirements/cpu.txt" in calls(checkout)
    second = lora(checkout, "train", "my config.yaml")
    assert (second.stdout, second.stderr, calls(checkout)) == (first.stdout, "", "")


def test_package_is_found_after_the_folder_moved(checkout):
    lora(checkout, "train")
    (path_file,) = checkout.glob(".venv/lib/*/site-packages/lora_jax.pth")
    assert (path_file.parent / path_file.read_text().strip()).resolve() == checkout.resolve()


def test_memory_comes_in_large_pages_unless_told_otherwise(checkout):
    lora(checkout, "train")
    python = checkout / ".venv/bin/python"
    python.write_text('#!/bin/sh\necho "$GLIBC_TUNABLES"\n')
    assert lora(checkout, "train").stdout == "glibc.malloc.hugetlb=1\n"
    own = "glibc.malloc.hugetlb=0"
    assert lora(checkout, "train", GLIBC_TUNABLES=own).stdout == own + "\n"


def test_changed_pins_are_installed(checkout):
    lora(checkout, "train")
    with open(checkout / "requirements/cpu.txt", "a") as file:
        file.write("# one more line\n")
    lora(checkout, "train")
    assert "pip install" in calls(checkout)
    assert "venv" not in calls(checkout).split()


def test_another_platform_gets_a_fresh_environment(checkout):
    lora(checkout, "train")
    lora(checkout, "train", LORA_JAX_PLATFORM="cuda13")
    assert "-r requirements/cuda13.txt" in calls(checkout)
    assert "venv" in calls(checkout).split()


def test_interrupted_set_up_is_taken_up_again(checkout):
    lora(checkout, "train")
    (checkout / ".venv/.lora").unlink()
    assert "./lora quickstart" in lora(checkout).stdout
    lora(checkout, "train")
    assert "pip install" in calls(checkout)


def test_test_command_installs_the_test_groups_and_runs_pytest(checkout):
    run = lora(checkout, "test", "-k", "nf4 or int4")
    assert run.stdout == "ran -m pytest -n 2 --dist worksteal -k nf4 or int4\n"
    assert "-r requirements/test.txt" in calls(checkout)
    assert "-r requirements/oracle.txt" in calls(checkout)
    assert "-r requirements/eval.txt" in calls(checkout)
    assert "-r requirements/serve.txt" in calls(checkout)
    assert "notebooks.txt" not in calls(checkout)
    lora(checkout, "test")
    assert calls(checkout) == ""
    lora(checkout, "test", "--all")
    assert "-r requirements/types.txt" in calls(checkout)
    assert "-r requirements/notebooks.txt" in calls(checkout)


def test_all_tests_run_on_both_stacks_of_jax(checkout):
    tools = checkout.parent / "tools"
    for name in ("python3.11", "python3.12", "python3.13", "python3.14"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")  # not even the system's own
        (tools / name).chmod(0o755)
    ours = "ran -m pytest -n 2 --dist worksteal --all -k a b\n"
    assert lora(checkout, "test", "--all", "-k", "a b").stdout == ours
    old = sys.version_info < (3, 12)
    other = tools / ("python3.12" if old else "python3.11")
    # Asked which stack it is, it names the other; asked where it is, itself.
    other.write_text(
        f"#!/bin/sh\ncase $2 in *'(3, 12)'*) echo {not old} ;; *) echo {sys.executable} ;; esac\n"
    )
    run = lora(checkout, "test", "--all", "-k", "a b")
    assert run.stdout == ours + ours.replace(" --all", "")
    assert f"and now on {other.name}" in run.stderr
    assert (checkout / ".venv-other/bin/python").exists()
    assert lora(checkout, "test", "--all", LORA_PYTHON=sys.executable).stdout.count("ran") == 1
    assert lora(checkout, "test").stdout.count("ran") == 1


def test_other_people_s_models_lie_apart(checkout):
    lora(checkout, "test", "--all")
    for name in ("transformers-flax", "tunix"):
        folder = checkout / ".venv/foreign" / name
        options = "--no-deps --require-hashes -r"
        assert f"{options} requirements/{name}.txt --target {folder}" in calls(checkout)
    lora(checkout, "test")
    assert "--target" not in calls(checkout)


def test_what_answers_http_is_added_where_somebody_serves(checkout):
    run = lora(checkout, "serve", "DIR")
    assert run.stdout == "ran -P -m lora_jax serve DIR\n"
    assert "--no-deps --require-hashes -r requirements/serve.txt" in calls(checkout)
    lora(checkout, "serve", "DIR")
    assert calls(checkout) == ""


@pytest.mark.parametrize(
    "name, pins", [("plan-tpu", "tpu.txt"), ("plan-gpu", "cuda13.txt"), ("eval", "eval.txt")]
)
def test_an_extra_is_added(checkout, name, pins):
    run = lora(checkout, "install", name)
    assert run.returncode == 0 and run.stdout == ""
    assert f"--no-deps --require-hashes -r requirements/{pins}" in calls(checkout)
    # The environment stays the one for this machine.
    lora(checkout, "train")
    assert calls(checkout) == ""
    wrong = lora(checkout, "install", "plan")
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)
    assert "install takes plan-tpu, plan-gpu or eval, got 'plan'" in wrong.stderr


@pytest.mark.parametrize("fetched", [True, False])
def test_a_python_without_pip_borrows_debian_s(checkout, fetched):
    tools = checkout.parent / "tools"
    (tools / "uv").rename(checkout.parent / "uv")
    (tools / "python3").unlink()
    scripts = {
        "python3": f'#!/bin/sh\nexec "{sys.executable}" -S "$@"\n',
        "apt-get": f"#!/bin/sh\n{'touch python3-pip_23.deb' if fetched else 'exit 100'}\n",
        "dpkg-deb": FAKE_DPKG,
    }
    for name, text in scripts.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    run = lora(checkout, "train", UV=str(checkout.parent / "uv"))
    if fetched:
        assert run.stdout == "ran -P -m lora_jax train\n"
        assert "venv" in calls(checkout).split()
    else:
        assert (run.returncode, run.stdout) == (1, "")
        assert "has no pip" in run.stderr


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("LORA_JAX_PLATFORM", "rocm", "must be cpu, cuda13 or tpu, got 'rocm'"),
        ("LORA_PYTHON", "no-such-python", "LORA_PYTHON=/path/to/python"),
    ],
)
def test_wrong_variable_gets_one_line(checkout, variable, value, words):
    run = lora(checkout, "train", **{variable: value})
    assert run.returncode == 2
    assert words in run.stderr
    assert run.stderr.count("\n") == 1
    assert not os.listdir(checkout).count(".venv")
