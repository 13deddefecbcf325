"""vit_sparse_fl's preset `rates`: what its runs start from, and that they are compared at equal budgets."""

from common import tuning
from vit_sparse_fl import rates
from vit_sparse_fl import run_all_experiments as runner


def planned(line):
    args = runner.parse(line.split())
    return args, runner.plan(args)


def flag(run, name):
    words = run.command
    return words[len(words) - 1 - words[::-1].index(name) + 1]


def test_each_seed_starts_from_its_split_and_tuning_from_another():
    args, runs = planned("--preset rates --only dense_iid_J4 central --output-dir out")
    first = {run.name: flag(run, "--classes") for run in runs if run.setting is None}
    assert first == {f"pretrain_seed_{i}": classes for i, classes in enumerate(rates.SPLITS)}
    rows = [run for run in runs if run.setting]
    assert args.seeds == list(range(6)) and len(rows) == 12
    for run in rows:
        assert run.needs == f"pretrain_seed_{int(flag(run, '--seed')) % 3}" and flag(run, "--classes") == "rest"
        assert flag(run, "--init-from") == f"out/{run.needs}"
    _, tuned = planned("--preset rates --only dense_iid_J4 central --tune --output-dir out")
    assert [run.name for run in tuned] == ["pretrain_seed_3", "central_seed_100", "dense_iid_J4_seed_100"]
    assert flag(tuned[0], "--classes") not in rates.SPLITS
    # nothing is measured besides while rates are looked for, and it is one setting all the same
    every = {flag(run, "--interference-every") for run in (*rows, *tuned) if "dense" in run.name}
    assert every == {"0", "30"} and flag(tuned[2], "--interference-every") == "0"
    assert {tuning.told(run) for run in rows} == {tuning.told(run) for run in tuned[1:]}


def test_all_rows_see_as_many_images_and_have_the_grid_of_rates():
    every = list(rates.settings())
    assert len({one.name for one in every}) == len(every) and {tuple(one.tune) for one in every} == {("lr",)}
    images = set()
    for one in every[1:]:
        words = dict(zip(one.words, one.words[1:], strict=False))
        images.add(int(words["--num-rounds"]) * int(words["--local-steps"]) * 10 * int(words["--batch-size"]))
    assert images == {153_600} and 6 * 22_500 < 153_600 < 7 * 22_500  # central: 7 passes
    groups = [one.group for one in every[1:]]
    assert groups.count("main_nc1_J4") == 8 and groups.count("controls_nc5_J16") == 3 and "forms_nc1_J4" not in groups
