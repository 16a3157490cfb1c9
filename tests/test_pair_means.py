"""What evaluations and logs say are means over pairs, whatever the batches; the right values are numpy's."""

import pytest
from judged_answers import BETA, LOG_ODDS, QUESTIONS, expected, judged, learn, rows

from sysdag import DataError, SysDPOConfig, SysDPOTrainer


def trainer_of(folder, **options):
    defaults = {
        "output_dir": str(folder), "beta": BETA, "report_to": [], "use_cpu": True, "disable_tqdm": True,
        "save_strategy": "no",
    }  # fmt: skip
    datasets = {name: options.pop(name) for name in ("train_dataset", "eval_dataset") if name in options}
    return SysDPOTrainer(judged(), SysDPOConfig(**(defaults | options)), **datasets)


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 5, 8])
def test_an_evaluation_is_the_mean_over_all_pairs_at_every_batch_size(tmp_path, batch, drops):
    options = {"per_device_eval_batch_size": batch, "dataloader_drop_last": drops}
    trainer = trainer_of(tmp_path, eval_dataset=rows(), **options)
    learn(trainer.system)
    found = trainer.evaluate()
    for name, value in expected().items():
        assert found[f"eval_{name}"] == pytest.approx(value, rel=1e-5), name
    assert found["eval_rewards/accuracies"] == pytest.approx(0.8)


def test_raw_rows_can_be_evaluated(tmp_path):
    trainer = trainer_of(tmp_path, train_dataset=rows(), per_device_eval_batch_size=2)
    learn(trainer.system)
    found = trainer.evaluate(rows(3), metric_key_prefix="first")
    for name, value in expected(3).items():
        assert found[f"first_{name}"] == pytest.approx(value, rel=1e-5), name
    found = trainer.evaluate({"all": rows(), "few": rows(3)})
    assert found["eval_all_rewards/accuracies"] == pytest.approx(0.8)
    assert found["eval_few_loss"] == pytest.approx(expected(3)["loss"], rel=1e-5)
    with pytest.raises(DataError, match="Row 0: input 'question' is missing"):
        trainer.evaluate([{"chosen": "yes", "rejected": "no"}])


@pytest.mark.parametrize("rows", [[], {"one": []}])
def test_nothing_to_evaluate_is_refused(tmp_path, rows):
    with pytest.raises(DataError, match=r"eval_dataset.* has no rows, so there is nothing to evaluate on"):
        trainer_of(tmp_path, eval_dataset=rows)
    with pytest.raises(DataError, match=r"eval_dataset.* has no rows"):
        trainer_of(tmp_path).evaluate(rows)


@pytest.mark.parametrize(("batch", "accumulation"), [(2, 1), (2, 3), (4, 2), (3, 2)])
def test_a_log_is_the_mean_over_the_pairs_since_the_last(tmp_path, batch, accumulation):
    """An epoch of 5 pairs, whose last batch is smaller; the rate of 0 leaves the policy as it is."""
    trainer = trainer_of(
        tmp_path, train_dataset=rows(), per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation,
        num_train_epochs=1, learning_rate=0.0, logging_steps=100, check_reference=False,
        logging_strategy="epoch",
    )  # fmt: skip
    learn(trainer.system)
    trainer.train()
    (logged,) = [line for line in trainer.state.log_history if "loss" in line]
    for name, value in expected().items():
        if name != "loss":  # what is optimised, a mean of batches
            assert logged[name] == pytest.approx(value, rel=1e-5), name


def test_the_judged_answers_are_five_of_which_four_are_right():
    assert len(QUESTIONS) == len(LOG_ODDS) == 5
    assert expected()["rewards/accuracies"] == 0.8
