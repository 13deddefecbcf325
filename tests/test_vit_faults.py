"""vit_sparse_fl's scripts: what the test images may not touch, a warm-up that is too long."""

import dataclasses

import harness
import pytest
import torch

from vit_sparse_fl import study, train_centralized, train_federated_sparse
from vit_sparse_fl.data import load_images, prepare
from vit_sparse_fl.flags import parse
from vit_sparse_fl.vit import init_from, make_model

WORDS = "--dataset demo --model tiny --classes 0:4 --threads 1 --amp off --seed 3 --lr 0.05 --head ridge --run-name r"
FEDERATED = (
    f"{WORDS} --batch-size 8 --num-clients 3 --participation-rate 1 --num-rounds 2 --local-steps 2 --eval-every 1"
)
SPARSE = f"{FEDERATED} --fisher-samples 16"


def run(script, words, monkeypatch, folder):
    monkeypatch.setattr(study, "draw_accuracy", lambda *_: None)
    script.main(parse(script.build_parser(), [*words.split(), "--output-dir", str(folder)]))
    return folder / "r"


@pytest.mark.parametrize(
    "script, words",
    [
        (train_centralized, f"{WORDS} --epochs 2 --warmup-epochs 0 --batch-size 72"),
        (train_federated_sparse, SPARSE),
    ],
)
def test_the_test_images_are_for_the_last_evaluation(script, words, monkeypatch, tmp_path):
    """With noise in their place the head, the mask, all weights and the validation metrics keep their bits."""
    made = load_images("demo", 3, classes=range(4))
    draws = torch.Generator().manual_seed(1)  # noise on which another penalty of the ridge head is the best
    noise = torch.randint(0, 256, made.test.shape, generator=draws, dtype=torch.uint8)
    noise = dataclasses.replace(made, test=noise, test_labels=torch.randint(0, 4, (len(noise),), generator=draws))
    folders = {}
    for data in (made, noise):
        monkeypatch.setattr(study, "load_images", lambda *_: data)
        name = "made" if data is made else "noise"
        folders[name] = run(script, f"{words} --final best", monkeypatch, tmp_path / name)
    found = {
        name: {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*.safetensors")}
        for name, folder in folders.items()
    }
    assert len(found["made"]) > 3 and found["made"] == found["noise"]
    assert harness.read_lines(folders["made"]) == harness.read_lines(folders["noise"])
    results = {name: harness.read_results(folder) for name, folder in folders.items()}
    alike = [{key: value for key, value in one.items() if not key.startswith("test_")} for one in results.values()]
    assert alike[0] == alike[1] and results["made"]["test_loss_last"] != results["noise"]["test_loss_last"]
    model = make_model("tiny", image_size=32, n_classes=4)
    init_from(model, folders["noise"])
    with torch.no_grad():
        right = model.eval()(prepare(noise.test, 32)).argmax(1) == noise.test_labels
    assert results["noise"]["test_accuracy_best"] == pytest.approx(right.double().mean().item())


def test_a_warm_up_longer_than_central_training_ends_with_its_last_epoch():
    words = "--epochs 3 --warmup-epochs 5 --lr 0.3 --min-lr 0.1"
    args = parse(train_centralized.build_parser(), words.split())
    assert [study.learning_rate(args, t) for t in range(3)] == pytest.approx([0.15, 0.3, 0.3])
