"""Training that is killed and taken up again ends with the weights of one that was not."""

import json
import os
import signal
import struct
import subprocess
import time
from dataclasses import replace

import numpy as np
import pytest

from aeheight.errors import InputError
from aeheight.events import EVENTS
from aeheight.journal import Journal, Last
from aeheight.models import Checkpoint
from aeheight.receipts import Ledger
from aeheight.recipe import Recipe
from aeheight.store import Store
from aeheight.training import Machine, fit
from tests.runs import copied, one_message
from tests.test_training import PROVENANCE, TINY, world

EPOCHS = TINY.model_copy(update={"epochs": 3})
CPU = Machine("cpu", 1)


class Killed(BaseException):
    """What a test does to a training."""


@pytest.fixture(scope="module")
def ground():
    return replace(world(), patches=16)


def checkpoint(region):
    return Checkpoint.from_bytes((region.store / "model" / "best.ckpt").read_bytes())


# --- in one process ----------------------------------------------------------------------------


class Mortal:
    """Ground on which the machine stops after so many reads."""

    def __init__(self, ground, reads):
        self._ground, self.left = ground, reads

    def __getattr__(self, name):
        return getattr(self._ground, name)

    def read(self, spot, margin=0):
        self.left -= 1
        if self.left < 0:
            raise Killed
        return self._ground.read(spot, margin)


@pytest.mark.parametrize("averaging", [None, 0.9])
def test_a_training_is_taken_up_at_the_last_epochs_end(ground, tmp_path, averaging):
    recipe = Recipe(averaging=averaging)
    undisturbed = fit(ground, EPOCHS, "ridge", PROVENANCE, recipe=recipe, machine=CPU)
    last = Last(Store.at(tmp_path), "last.ckpt", "key")
    validation = len(ground.validation())
    records = []
    # In the midst of the second epoch; what is read ahead is dropped.
    mortal = Mortal(ground, 2 * validation + 16 + 3)
    with pytest.raises(Killed):
        fit(mortal, EPOCHS, "ridge", PROVENANCE, records.append, recipe=recipe, last=last,
            machine=CPU)  # fmt: skip
    assert [record["epoch"] for record in records] == [0, 1]
    again = fit(ground, EPOCHS, "ridge", PROVENANCE, records.append, recipe=recipe, last=last,
                machine=CPU)  # fmt: skip
    assert [record["epoch"] for record in records] == [0, 1, 2, 3]
    assert again.digest == undisturbed.digest
    for one, other in zip(again.history, undisturbed.history, strict=True):
        for key in ("loss", "train_rmse", "validation_rmse", "learning_rate"):
            assert one.get(key) == other.get(key), key
    # A training that was killed after its last epoch has no epoch left to do.
    silent = []
    whole = fit(ground, EPOCHS, "ridge", PROVENANCE, silent.append, recipe=recipe, last=last,
                machine=CPU)  # fmt: skip
    assert (whole.digest, silent) == (undisturbed.digest, [])


def test_an_average_is_not_the_weights(ground):
    plain = fit(ground, EPOCHS, "none", PROVENANCE, machine=CPU)
    averaged = fit(ground, EPOCHS, "none", PROVENANCE, recipe=Recipe(averaging=0.9), machine=CPU)
    assert averaged.digest != plain.digest


def test_the_state_of_another_training_and_a_damaged_one_begin_anew(ground, tmp_path, caplog):
    one = EPOCHS.model_copy(update={"epochs": 1})
    store = Store.at(tmp_path)
    fit(ground, one, "ridge", PROVENANCE, last=Last(store, "last.ckpt", "key"), machine=CPU)
    assert Last(store, "last.ckpt", "key").load() is not None
    assert Last(store, "last.ckpt", "other").load() is None
    assert "is of another training" in caplog.text
    data = store.read("last.ckpt")
    store.write("last.ckpt", data[: len(data) // 2])
    assert Last(store, "last.ckpt", "key").load() is None
    assert "is damaged" in caplog.text


@pytest.mark.slow
def test_two_processes_train_one_model(ground):
    """By gloo on a CPU: each does its share of every batch, and they agree on the weights."""
    settings = EPOCHS.model_copy(update={"epochs": 2})
    records = []
    both = fit(ground, settings, "ridge", PROVENANCE, machine=Machine("cpu", 2))
    alone = fit(ground, settings, "ridge", PROVENANCE, records.append, machine=CPU)
    assert [record["epoch"] for record in both.history] == [0, 1, 2]
    assert both.history[0]["validation_rmse"] == pytest.approx(
        alone.history[0]["validation_rmse"], rel=1e-9
    )
    best = min(record["validation_rmse"] for record in both.history)
    assert best == pytest.approx(alone.rmse, rel=0.1)
    assert both.weights.keys() == alone.weights.keys()


# --- the command -------------------------------------------------------------------------------


def trained(command, region, *options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    return subprocess.Popen(
        [*command, "train", str(region.path), *options],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_goes_on_to_the_same_weights(command, small_run, regions):
    """kill -9 in the midst of the third epoch; the rerun tells only of what was left to do."""
    options = {"epochs": 4, "patches_per_epoch": 64}
    whole = regions.write("whole", model=options)
    killed = regions.write("killed", model=options)
    for region in (whole, killed):
        copy_cube(small_run, region)
    process = trained(command, whole)
    assert process.communicate()[1].count("epoch") == 5
    assert process.returncode == 0

    process = trained(command, killed)
    for line in process.stderr:
        if "epoch   2" in line:
            break
    time.sleep(0.3)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    model = killed.store / "model"
    assert not (model / "best.ckpt").exists()
    assert (model / "last.ckpt").exists()

    process = trained(command, killed)
    told = process.communicate()[1]
    assert process.returncode == 0, told
    assert [n for n in range(5) if f"epoch   {n}" in told] in ([3, 4], [4])  # it is quick, at times
    assert checkpoint(killed).digest == checkpoint(whole).digest
    assert not (model / "last.ckpt").exists()
    rows = (model / "history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3", "4"]
    assert (model / EVENTS).exists()


def copy_cube(source, target):
    import shutil  # noqa: PLC0415

    for name in ("cube.zarr", "cube.receipts"):
        shutil.copytree(source.store / name, target.store / name)


def test_a_training_under_way_refuses_other_settings(aeheight, small_run, regions):
    region = copied(small_run, regions)
    model = region.store / "model"
    (model / "best.ckpt").rename(model / "last.ckpt")
    for verb in (["train"], ["train", "--plan"]):
        result = aeheight(*verb, region.path, "--set", "model.learning_rate=0.5")
        assert result.code == 2
        one_message(result.err, "model.learning_rate: 0.001 -> 0.5", "--overwrite")


def test_a_model_of_a_cube_that_is_gone_is_refused(aeheight, small_run, regions):
    region = copied(small_run, regions)
    ledger = Ledger(Store.at(region.store / "model"))
    asked = ledger.settings() | {"cube": "another"}
    (region.store / "model" / "settings.json").write_text(json.dumps(asked))
    for verb in ("train", "predict"):
        result = aeheight(verb, region.path)
        assert result.code == 2
        one_message(result.err, "another", "train --overwrite" if verb == "predict" else "cube")


def test_a_cube_that_was_given_more_keeps_its_model_but_not_unsaid(aeheight, small_run, regions):
    region = copied(small_run, regions)
    ground = region.store / "model" / "ground.json"
    assert "has been given other tiles" not in aeheight("train", region.path).err
    ground.write_text(json.dumps({"cube": "other"}))
    result = aeheight("train", region.path)
    assert result.code == 0
    assert "has been given other tiles" in result.err


# --- the logs ----------------------------------------------------------------------------------


def test_tensorboard_reads_the_events(tmp_path):
    loader = pytest.importorskip(
        "tensorboard.backend.event_processing.event_file_loader", reason="needs tensorboard"
    )
    from aeheight.events import tensorboard  # noqa: PLC0415

    records = [
        {"epoch": 0, "validation_rmse": 12.5, "seconds": 3.0},
        {"epoch": 300, "validation_rmse": 0.1, "loss": 1e-9, "seconds": 7.5},
    ]
    path = tmp_path / EVENTS
    path.write_bytes(tensorboard(records, 1e9))
    found = {}
    for event in loader.LegacyEventFileLoader(str(path)).Load():
        for value in event.summary.value:
            found[event.step, value.tag] = (event.wall_time, value.simple_value)
    assert found == {
        (0, "validation_rmse"): (1e9 + 3, 12.5),
        (300, "validation_rmse"): (1e9 + 7.5, np.float32(0.1)),
        (300, "loss"): (1e9 + 7.5, np.float32(1e-9)),
    }


@pytest.mark.parametrize("epoch", [2, 3])
def test_no_epoch_is_lost_that_ended_just_before_a_kill(
    aeheight, small_run, regions, monkeypatch, epoch
):
    """Its state was kept, and it was not told of yet; after the last epoch, too."""
    region = regions.write("killed", model={"architecture": "unet", "epochs": 3})
    copy_cube(small_run, region)
    tell = Journal.tell

    def killed(journal):
        if journal.history[-1]["epoch"] == epoch:
            raise Killed
        tell(journal)

    with monkeypatch.context() as patched:
        patched.setattr(Journal, "tell", killed)
        with pytest.raises(Killed):
            aeheight("train", region.path)
    model = region.store / "model"
    assert steps_of(model / EVENTS) == [*range(epoch)]
    result = aeheight("train", region.path)
    assert result.code == 0, result.err
    assert steps_of(model / EVENTS) == [0, 1, 2, 3]
    rows = (model / "history.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["epoch", "0", "1", "2", "3"]


def steps_of(path):
    """The steps of an event file's records: a frame is length, CRC, event, CRC."""
    data, steps = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        event, data = data[12 : 12 + size], data[16 + size :]
        if event[9] == 0x10:  # behind the wall time: a step, below 128 here
            steps.append(event[10])
    return steps


# --- bad input ---------------------------------------------------------------------------------


def test_infinite_heights_are_named(ground):
    height = ground.height.copy()
    height[5, 5] = np.inf
    with pytest.raises(InputError, match=r"1 pixels of `height` are infinite.*height\.nodata"):
        fit(replace(ground, height=height), EPOCHS, "ridge", PROVENANCE, machine=CPU)
