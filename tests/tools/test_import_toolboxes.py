"""Configs of PyCIL and PILOT, written by hand from their keys, become the experiments that are shipped."""

from pathlib import Path

import pytest

from models.factory import config_from, load_config
from tests.tools.test_import_config import written
from tools.import_config.command import imported
from tools.import_config.equal import resolved
from utils.errors import ConfigError

EXPS = Path(__file__).resolve().parent.parent.parent / "exps"

COMMON = {"prefix": "reproduce", "shuffle": True, "device": ["0"], "seed": [1993], "memory_size": 2000,
          "memory_per_class": 20, "fixed_memory": False}  # fmt: skip
PYCIL = COMMON | {"dataset": "cifar100", "init_cls": 10, "increment": 10, "convnet_type": "resnet32"}
PILOT = COMMON | {"dataset": "cifar224", "init_cls": 10, "increment": 10, "backbone_type": "pretrained_vit_b16_224"}
TUNED = {"tuned_epoch": 20, "init_lr": 0.01, "batch_size": 48, "weight_decay": 5e-4, "min_lr": 0, "optimizer": "sgd",
         "vpt_type": "Deep", "prompt_token_num": 5, "ffn_num": 64}  # fmt: skip
PROMPT = {"tuned_epoch": 5, "init_lr": 0.001, "batch_size": 24, "weight_decay": 0, "min_lr": 1e-5, "optimizer": "adam",
          "scheduler": "constant", "reinit_optimizer": True, "global_pool": "token", "pull_constraint": True,
          "pull_constraint_coeff": 0.1, "size": 10, "length": 5, "initializer": "uniform", "prompt_key": True,
          "prompt_key_init": "uniform", "batchwise_prompt": True, "embedding_key": "cls", "predefined_key": "",
          "pretrained": True, "drop": 0.0, "drop_path": 0.0, "get_original_backbone": True,
          "freeze": ["blocks", "patch_embed", "cls_token", "norm", "pos_embed"]}  # fmt: skip
FROM_SCRATCH = {"init_epoch": 200, "init_lr": 0.1, "init_weight_decay": 5e-4, "init_lr_decay": 0.1,
                "init_milestones": [60, 120, 170], "lrate": 0.1, "lrate_decay": 0.1}  # fmt: skip
STEPS = {"init_epoch": 20, "init_lr": 1e-3, "init_milestones": [60, 120, 170], "init_lr_decay": 0.1,
         "init_weight_decay": 5e-4, "epochs": 20, "lrate": 1e-3, "milestones": [40, 70], "lrate_decay": 0.1,
         "batch_size": 128, "weight_decay": 2e-4, "optimizer": "sgd", "scheduler": "steplr"}  # fmt: skip
FOSTER = {"beta1": 0.96, "beta2": 0.97, "oofc": "ft", "is_teacher_wa": False, "is_student_wa": False,
          "lambda_okd": 1, "wa_value": 1, "T": 2}  # fmt: skip
TOOLBOX = {
    **{f"{name}/cifar100_b0inc10_resnet32": PYCIL | {"model_name": name}
       for name in ("replay", "icarl", "wa", "lwf", "ewc", "bic", "der", "gem")},
    "memo/cifar100_b0inc10_resnet32": PYCIL | FROM_SCRATCH | {
        "model_name": "memo", "scheduler": "steplr", "t_max": None, "milestones": [80, 120, 150], "epochs": 170,
        "batch_size": 128, "weight_decay": 2e-4, "alpha_aux": 1.0, "train_base": True, "train_adaptive": False},
    "coil/cifar100_b0inc10_resnet32": PYCIL | {
        "model_name": "coil", "convnet_type": "cosine_resnet32", "sinkhorn": 0.464, "calibration_term": 1.5,
        "norm_term": 3.0, "reg_term": 1e-3},
    "foster/cifar100_b50inc10_resnet32": PYCIL | FOSTER | {
        "model_name": "foster", "init_cls": 50, "fixed_memory": True, "init_epochs": 200, "init_lr": 0.1,
        "init_weight_decay": 5e-4, "boosting_epochs": 170, "compression_epochs": 130, "lr": 0.1, "batch_size": 128,
        "weight_decay": 5e-4, "num_workers": 8},
    "finetune/cifar224": PILOT | STEPS | {"model_name": "finetune"},
    "icarl/cifar100_b0inc10": PILOT | STEPS | {"model_name": "icarl", "T": 2},
    "icarl/imagenetr_b0inc20": PILOT | STEPS | {
        "model_name": "icarl", "T": 2, "dataset": "imagenetr", "init_cls": 20, "increment": 20, "batch_size": 32,
        "memory_size": 4000, "fixed_memory": True},
    "der/cifar100_b0inc10": PILOT | STEPS | {"model_name": "der", "init_epoch": 10, "epochs": 10, "batch_size": 32},
    "memo/cifar100_b0inc10": PILOT | STEPS | {
        "model_name": "memo", "init_epoch": 10, "batch_size": 32, "alpha_aux": 1.0, "train_base": False,
        "train_adaptive": False, "t_max": None},
    "coil/cifar100_b0inc10": PILOT | STEPS | {
        "model_name": "coil", "init_epoch": 10, "epochs": 10, "batch_size": 64, "weight_decay": 5e-4, "T": 2,
        "sinkhorn": 0.464, "calibration_term": 1.5, "norm_term": 3.0, "reg_term": 1e-3},
    "foster/cifar100_b0inc10": PILOT | FOSTER | {
        "model_name": "foster", "fixed_memory": True, "init_epochs": 20, "init_lr": 1e-3, "init_weight_decay": 5e-4,
        "boosting_epochs": 20, "compression_epochs": 20, "lr": 1e-3, "batch_size": 32, "weight_decay": 5e-4},
    "aper/cifar224_inc10_adapter": PILOT | TUNED | {"model_name": "aper_adapter"},
    "aper/cifar224_inc10_vpt_deep": PILOT | TUNED | {"model_name": "adam_vpt"},
    "aper/cifar224_inc10_finetune": PILOT | TUNED | {
        "model_name": "aper_finetune", "tuned_epoch": 6, "batch_size": 128, "weight_decay": 0.05},
    "aper/cifar224_ssf": PILOT | TUNED | {
        "model_name": "adam_ssf", "init_cls": 5, "increment": 5, "backbone_type": "pretrained_vit_b16_224_in21k_ssf"},
    "ranpac/cifar224_pilot": PILOT | TUNED | {"model_name": "ranpac", "use_RP": True, "M": 10000},
    "fecam/cifar224_pilot": PILOT | TUNED | {"model_name": "fecam"},
    "ease/cub_in1k": PILOT | {
        "dataset": "cub", "model_name": "ease", "backbone_type": "vit_base_patch16_224_ease", "init_epochs": 20,
        "init_lr": 0.005, "later_epochs": 20, "later_lr": 0.005, "batch_size": 16, "weight_decay": 5e-4, "min_lr": 0,
        "optimizer": "sgd", "scheduler": "cosine", "vpt_type": "Deep", "prompt_token_num": 5, "ffn_num": 64,
        "use_diagonal": False, "recalc_sim": True, "alpha": 0.005, "use_init_ptm": True, "beta": 1,
        "use_old_data": False, "use_reweight": True, "moni_adam": False, "adapter_num": -1},
    "mos/imageneta_in21k": PILOT | {
        "dataset": "imageneta", "init_cls": 20, "increment": 20, "model_name": "mos",
        "backbone_type": "vit_base_patch16_224_in21k_mos", "tuned_epoch": 10, "init_lr": 0.05, "batch_size": 32,
        "weight_decay": 0.005, "min_lr": 0, "optimizer": "sgd", "scheduler": "cosine", "ffn_num": 16, "reg": 0.1,
        "adapter_momentum": 0.1, "ensemble": True, "crct_epochs": 30, "ca_lr": 0.005,
        "ca_storage_efficient_method": "variance", "n_centroids": 10, "vpt_type": "Deep", "prompt_token_num": 5},
    "lae/cifar224_pilot": PILOT | {
        "model_name": "lae", "backbone_type": "vit_base_patch16_224_lae", "tuned_epoch": 5, "init_lr": 0.0028125,
        "batch_size": 128, "weight_decay": 0, "optimizer": "adam", "pet_cls": "Prefix", "adapt_blocks": [0, 1, 2, 3, 4],
        "num_freeze_epochs": 3, "ema_decay": 0.9999, "reinit_optimizer": True},
    "l2p/cifar224_in1k": PILOT | PROMPT | {
        "model_name": "l2p", "backbone_type": "vit_base_patch16_224_l2p", "init_lr": 0.001875, "batch_size": 16,
        "top_k": 5, "use_prompt_mask": False, "shared_prompt_pool": False, "shared_prompt_key": False,
        "prompt_pool": True, "head_type": "prompt"},
    "dualprompt/cifar224_in1k": PILOT | PROMPT | {
        "model_name": "dualprompt", "backbone_type": "vit_base_patch16_224_dualprompt", "top_k": 1,
        "use_g_prompt": True, "g_prompt_length": 5, "g_prompt_layer_idx": [0, 1], "use_prefix_tune_for_g_prompt": True,
        "use_e_prompt": True, "e_prompt_layer_idx": [2, 3, 4], "use_prefix_tune_for_e_prompt": True,
        "use_prompt_mask": True, "shared_prompt_pool": True, "shared_prompt_key": False, "prompt_pool": True,
        "same_key_value": False, "head_type": "token"},
    "coda_prompt/cifar224_in1k": PILOT | {
        "model_name": "coda_prompt", "backbone_type": "vit_base_patch16_224_coda_prompt", "shuffle": False,
        "seed": [0], "tuned_epoch": 20, "init_lr": 0.001, "batch_size": 128, "weight_decay": 0, "min_lr": 1e-5,
        "optimizer": "adam", "prompt_param": [100, 8, 0.0]},
}  # fmt: skip


@pytest.mark.parametrize("name", TOOLBOX)
def test_toolbox_config_becomes_the_shipped_experiment(tmp_path, name):
    values, _ = imported(written(tmp_path, TOOLBOX[name]))
    ours, shipped = config_from(values, "imported"), load_config(str(EXPS / f"{name}.json"))
    assert resolved(ours) == resolved(shipped)


def test_pilots_slca_is_its_own(tmp_path):
    theirs = PILOT | {
        "model_name": "slca", "model_postfix": "20e", "backbone_type": "pretrained_vit_b16_224_in21k", "epochs": 20,
        "milestones": [18], "lrate": 0.01, "batch_size": 64, "bcb_lrscale": 0.01, "ca_epochs": 3,
        "ca_with_logit_norm": 0.1,
    }  # fmt: skip
    config = config_from(imported(written(tmp_path, theirs))[0], "imported")
    assert (config.model_name, config.batch_size, config.ca_epochs, config.milestones) == ("slca", 64, 3, (18,))
    assert (config.train_transform, config.normalize) == ("crop_flip_scale05", "none")


@pytest.mark.parametrize("name", ["podnet", "rmm-icarl", "cofima"])
def test_learner_that_is_not_here_is_said(tmp_path, name):
    for family in (PYCIL, PILOT):
        with pytest.raises(ConfigError, match="is not here"):
            imported(written(tmp_path, family | {"model_name": name}))
