"""`lora plan` as a person meets it."""

import json

import pytest

from lora_jax.cli import main
from lora_jax.plan import _search


@pytest.fixture
def ready(monkeypatch, make_plan):
    """Let plans be made at once: 30 GB on a card of 24, or 20 with a batch of 1."""

    def plan(config, target="cpu", words=(), **options):
        small = "--train.batch_size" in words or "--model.remat" in words
        batch, seq = 4, 2048
        if "--data.max_length" in words:
            given = dict(zip(words[::2], words[1::2], strict=True))
            batch, seq = int(given["--train.batch_size"]), int(given["--data.max_length"])
        total = (20 if small else 30) * 10**9
        return make_plan({"batch_size": batch, "max_length": seq}, total=total)

    monkeypatch.setattr("lora_jax.plan.plan", plan)
    monkeypatch.setattr(_search, "plan", plan)


def test_it_finds_a_change_that_fits(ready, capsys):
    main(["plan", "x.yaml", "--target", "rtx4090"])
    out, err = capsys.readouterr()
    assert "does not fit, 5.9 GB too much" in out
    assert "it fits with --model.remat nothing" in out and out.count("sum ") == 2
    assert err.splitlines() == [
        "--train.loss_chunk 128: 30.00 GB, does not fit",
        "--model.remat nothing: 20.00 GB, fits",
    ]


def test_it_does_not_search_unless_wanted(ready, capsys):
    main(["plan", "x.yaml", "--no-search"])
    out, err = capsys.readouterr()
    assert "does not fit" in out and "it fits with" not in out and err == ""


def test_json_for_scripts(ready, capsys):
    main(["plan", "x.yaml", "--json", "--train.batch_size", "1"])
    plain = json.loads(capsys.readouterr().out)
    assert plain["total"] == 20 * 10**9 and plain["fits"] and "fits_with" not in plain
    main(["plan", "x.yaml", "--json"])
    out, err = capsys.readouterr()
    plain = json.loads(out)
    assert plain["fits_with"] == ["--model.remat", "nothing"]
    assert not plain["fits"] and plain["fits_plan"]["fits"]
    assert "does not fit" in err


def test_a_sweep_and_its_picture(ready, capsys, tmp_path):
    picture = tmp_path / "sweep.png"
    words = ["--sweep", "batch=1:2,seq=512:1024", "--picture", str(picture)]
    main(["plan", "x.yaml", *words])
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 4 and len(err.splitlines()) == 4
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "words, message",
    [
        (["plan", "nowhere.yaml"], "nowhere.yaml: cannot read"),
        (["plan", "nowhere.yaml", "--target", "h10"], "unknown 'h10'"),
        (["plan", "nowhere.yaml", "--targt", "h100"], "unknown flag --targt (did you mean"),
        (["plan", "nowhere.yaml", "--sweep", "rows"], "'rows' is no axis"),
        (["plan"], "required: CONFIG.yaml"),
        (["plan", "x.yaml", "--output", "y"], "takes no --output"),
    ],
)
def test_what_it_refuses(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main(words)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
