"""Configs of other repositories, written by hand from their keys, become the experiments that are shipped."""

import json
from pathlib import Path

import pytest
import yaml

import main
from models.factory import config_from, load_config
from tools.import_config.command import imported, parse_flags
from tools.import_config.equal import shipped_like
from utils.errors import ConfigError, UserError

EXPS = Path(__file__).resolve().parent.parent.parent / "exps"
SEEDS = [1993, 1996, 1997]
IN21K = "vit_base_patch16_224.augreg_in21k"


def raa(dataset, increment, margin, rho, epochs=10, seed=SEEDS, **keys):
    return {
        "prefix": "reproduce", "dataset": dataset, "shuffle": dataset != "vtab", "init_cls": increment,
        "increment": increment, "model_name": "adapter", "convnet_type": "pretrained_vit_b16_224_in21k_adapter",
        "device": ["0"], "seed": seed, "ssca": True, "ca": True, "init_epochs": 20, "inc_epochs": epochs,
        "ca_epochs": 5, "init_lr": 0.01, "batch_size": 48, "weight_decay": 5e-4, "min_lr": 0, "ffn_num": 64,
        "optimizer": "sgd", "scale": 20, "margin": margin, "perturb": True, "rho": rho, "adapter_num": 2,
        "loss_weight": 2.0, "use_RP": True, "M": 10000, "vpt_type": "Deep", "prompt_token_num": 5, **keys,
    }  # fmt: skip


def simplecil(dataset, backbone, batch):
    return {
        "prefix": "reproduce", "dataset": dataset, "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
        "shuffle": True, "init_cls": 20, "increment": 20, "model_name": "simplecil", "convnet_type": backbone,
        "device": ["0"], "seed": [1993], "tuned_epoch": 0, "init_lr": 0.01, "batch_size": batch,
        "weight_decay": 0.05, "min_lr": "1e-8", "optimizer": "sgd", "vpt_type": "shallow", "prompt_token_num": 5,
    }  # fmt: skip


def inflora(model, dataset, increment, optim, lrate, epochs, rank, lamb, sessions, seed=(0,), **keys):
    return {
        "prefix": "reproduce", "dataset": dataset, "data_path": "/data/x", "memory_size": 0, "memory_per_class": 0,
        "fixed_memory": True, "shuffle": False, "init_cls": increment, "increment": increment, "model_name": model,
        "net_type": "sip", "embd_dim": 768, "num_heads": 12, "total_sessions": sessions, "seed": list(seed),
        "EPSILON": 1e-8, "init_epoch": epochs, "init_lr": lrate, "init_lr_decay": 0.1, "init_weight_decay": 0.0,
        "epochs": epochs, "lrate": lrate, "lrate_decay": 0.1, "batch_size": 128, "weight_decay": 0.0, "rank": rank,
        "lamb": lamb, "lame": 1.0, "num_workers": 16, "optim": optim, **keys,
    }  # fmt: skip


def slca(plus, data, moco):
    epochs = 90 if moco else 20 if data == "cifar" else 50
    name = {"cifar": "cifar100_224", "imgnetr": "imagenet-r", "cub": "cub200_224", "cars": "cars196_224"}[data]
    values = {
        "prefix": "reproduce", "dataset": name, "memory_size": 0, "memory_per_class": 0, "fixed_memory": False,
        "shuffle": True, "init_cls": 10 if data == "cifar" else 20, "increment": 10 if data == "cifar" else 20,
        "model_name": "slcapp_x" if plus else f"slca_{data}", "model_postfix": "20e",
        "convnet_type": "vit-b-p16" + ("-lora" if plus else "") + ("-mocov3" if moco else ""), "device": ["0", "1"],
        "seed": SEEDS, "epochs": epochs, "ca_epochs": 5, "ca_with_logit_norm": 0.05 if data == "cars" else 0.1,
        "milestones": [60, 80] if plus and moco else [80] if moco else [18] if data == "cifar" else [40],
    }  # fmt: skip
    if plus:
        half = data in ("imgnetr", "cars")
        values |= {"lora_rank": 4, "bcb_lrscale": 0.1, "fc_scale_mu": 0.02, "sce_a": 0.5 if half else 1.0,
                   "sce_b": 0.5 if half else 0.1}  # fmt: skip
        values |= {"weight_decay": 0} if half else {} if data == "cub" else {"weight_decay": 5e-4}
    return values


def hcl(data, variant):
    name, size = {
        "cifar10": ("seq-cifar10", 32),
        "cifar100": ("seq-cifar100", 32),
        "tinyimagenet": ("seq-tinyimg", 64),
    }[data]
    train = {
        "optimizer": {"name": "sgd", "weight_decay": 5e-4, "momentum": 0.9}, "warmup_epochs": 10, "warmup_lr": 0,
        "base_lr": 0.03, "final_lr": 0, "num_epochs": 200, "stop_at_epoch": 200, "batch_size": 32,
        "alpha": 3 if variant == "distil" or data == "cifar100" else 1,
    }  # fmt: skip
    if variant == "qdi":
        small = data == "cifar10"
        train |= {"di_itrs": 500, "di_lr": 0.005 if small else 0.03, "di_feature": 0.1 if small else 0.2,
                  "di_var": 0.001 if small else 0.003, "di_l2": 0 if small else 0.003}  # fmt: skip
    return {
        "name": "x", "seed": None, "dataset": {"name": name, "image_size": size, "num_workers": 4},
        "model": {"name": "simsiam", "backbone": "resnet18", "proj_layers": 2, "cl_model": variant, "buffer_size": 200},
        "train": train, "eval": {"base_lr": 30, "optimizer": {"name": "sgd"}}, "logger": {"matplotlib": False},
    }  # fmt: skip


CIFAR, R = ("cifar100", 10), ("ImageNet_R", 20)
SHIPPED = {
    "raa/cifar224": raa("cifar224", 10, 0.0, 0.01),
    "raa/cub": raa("cub", 20, 0.0, 0.1),
    "raa/imagenetr": raa("imagenetr", 20, 0.0, 0.1),
    "raa/imageneta": raa("imageneta", 20, 0.3, 0.1, seed=[1993]),
    "raa/cars": raa("cars196_224", 20, 0.3, 0.05),
    "raa/vtab": raa("vtab", 10, 0.3, 0.01, 15, [1993]),
    "simplecil/imagenetr": simplecil("imagenetr", "pretrained_vit_b16_224_in21k", 128),
    "simplecil/cub": simplecil("cub", "vit_base_patch16_224", 256),
    "inflora/cifar224": inflora("InfLoRA", *CIFAR, "adam", 5e-4, 20, 10, 0.95, 10, range(5)),
    "inflora/cifar224_b5": inflora("InfLoRAb5", *CIFAR, "adam", 1e-3, 20, 10, 0.95, 10),
    "inflora/cifar224_ca": inflora("InfLoRA_CA1", *CIFAR, "sgd", 1e-3, 20, 5, 0.95, 10, fc_lrate=0.01,
                                   weight_decay=1e-3),
    "inflora/imagenetr_t10": inflora("InfLoRA", *R, "adam", 5e-4, 50, 10, 0.98, 10, range(5)),
    "inflora/imagenetr_t10_b5": inflora("InfLoRAb5", *R, "adam", 5e-4, 50, 10, 0.99, 10),
    "inflora/imagenetr_t10_ca": inflora("InfLoRA_CA", *R, "sgd", 1e-3, 50, 10, 0.95, 10),
    "inflora/imagenetr_t20": inflora("InfLoRA", "ImageNet_R", 10, "adam", 5e-4, 50, 10, 0.98, 20),
    "inflora/imagenetr_t20_b5": inflora("InfLoRAb5", "ImageNet_R", 10, "adam", 5e-4, 50, 10, 0.99, 20),
    "inflora/imagenetr_t5": inflora("InfLoRA", "ImageNet_R", 40, "adam", 5e-4, 50, 10, 0.98, 5),
    "inflora/imagenetr_t5_b5": inflora("InfLoRAb5", "ImageNet_R", 40, "adam", 5e-4, 50, 10, 0.98, 5),
    "inflora/domainnet": inflora("InfLoRA_domain", "domainnet", 69, "sgd", 5e-3, 5, 30, 0.95, 5, fc_lrate=0.01),
    "inflora/domainnet_b5": inflora("InfLoRAb5_domain", "domainnet", 69, "sgd", 5e-3, 5, 30, 0.95, 5, fc_lrate=0.01),
    **{
        f"{'slcapp' if plus else 'slca'}/{ours}_{'mocov3' if moco else 'in21k'}": slca(plus, data, moco)
        for plus in (False, True)
        for data, ours in (("cifar", "cifar224"), ("imgnetr", "imagenetr"), ("cub", "cub_official"), ("cars", "cars"))
        for moco in (False, True)
    },
    **{
        f"hcl/{data}_{variant}": hcl(data, variant)
        for data in ("cifar10", "cifar100", "tinyimagenet")
        for variant in ("distil", "distilbuf", "qdi")
    },
}  # fmt: skip


def written(tmp_path, values, name="theirs"):
    nested = isinstance(values.get("model"), dict)
    path = tmp_path / f"{name}.{'yaml' if nested else 'json'}"
    path.write_text(yaml.safe_dump(values) if nested else json.dumps(values))
    return path


def test_all_45_files_of_the_four_repositories_are_here():
    assert len(SHIPPED) == 45


@pytest.mark.parametrize("name", SHIPPED)
def test_becomes_the_shipped_experiment(tmp_path, name):
    path = written(tmp_path, SHIPPED[name])
    values, remarks = imported(path, ["--hcl", "--cl_default"] if name.startswith("hcl") else [])
    ours, shipped = config_from(values, "imported"), load_config(str(EXPS / f"{name}.json"))
    assert ours.model_dump(exclude={"about"}) == shipped.model_dump(exclude={"about"})
    assert f"the same run is shipped: exps/{name}.json" in remarks
    assert values["about"]["imported"] == str(path)


def test_about_says_what_was_ignored_and_set(tmp_path):
    about = imported(written(tmp_path, SHIPPED["raa/cub"]))[0]["about"]
    assert about["ignored"] == ["prefix", "device", "use_RP", "M", "vpt_type", "prompt_token_num"]
    assert {"upstream", "lrate", "train_transform", "test_transform", "normalize"} <= set(about["constants"])
    assert about["shipped"] == ["exps/raa/cub.json"]


def test_every_key_is_read_or_ignored_or_an_error(tmp_path):
    """A key that no table names stops the import, whatever the family; the nearest known one is named."""
    for name in ("raa/cub", "simplecil/cub", "inflora/cifar224", "slca/cars_in21k", "slcapp/cars_in21k"):
        with pytest.raises(ConfigError, match='unknown key "shufle": did you mean "shuffle"'):
            imported(written(tmp_path, SHIPPED[name] | {"shufle": True}))
    nested = json.loads(json.dumps(SHIPPED["hcl/cifar10_qdi"]))
    nested["train"]["di_steps"] = 4
    with pytest.raises(ConfigError, match=r'unknown key "train\.di_steps"'):
        imported(written(tmp_path, nested))


REFUSED = [
    ("raa/cub", {"adapter_num": 3}, "adapter_num"),
    ("raa/cub", {"optimizer": "adam"}, "optimizer"),
    ("raa/cub", {"dataset": "cub200"}, "dataset"),
    ("raa/cub", {"convnet_type": "resnet18"}, "convnet_type"),
    ("inflora/cifar224", {"model_name": "sprompts_l2p"}, "model_name"),
    ("inflora/cifar224", {"net_type": "vit"}, "net_type"),
    ("inflora/cifar224", {"embd_dim": 384}, "embd_dim"),
    ("inflora/cifar224", {"num_heads": 6}, "num_heads"),
    ("inflora/cifar224", {"total_sessions": 20}, "total_sessions"),
    ("inflora/cifar224", {"optim": "lars"}, "optim"),
    ("inflora/domainnet", {"dataset": "ImageNet_R", "total_sessions": 3}, "dataset"),
    ("slca/cifar224_in21k", {"convnet_type": "resnet18"}, "convnet_type"),
    ("slca/cifar224_in21k", {"dataset": "cifar10"}, "dataset"),
    ("slca/cifar224_in21k", {"dataset": "imagenet1000"}, "dataset"),
]


@pytest.mark.parametrize(
    "name, change, key", REFUSED, ids=[f"{key}-{number}" for number, (_, _, key) in enumerate(REFUSED)]
)
def test_a_value_without_counterpart_is_refused_by_its_key(tmp_path, name, change, key):
    with pytest.raises(ConfigError) as caught:
        imported(written(tmp_path, SHIPPED[name] | change))
    assert any(fault.startswith(f'"{key}"') for fault in caught.value.faults)


@pytest.mark.parametrize("place, value", [
    (("train", "optimizer", "name"), "lars"), (("dataset", "name"), "seq-mnist"), (("model", "cl_model"), "icarl"),
    (("model", "backbone"), "swin"),
])  # fmt: skip
def test_a_value_of_hcl_without_counterpart_is_refused(tmp_path, place, value):
    values = json.loads(json.dumps(SHIPPED["hcl/cifar10_distil"]))
    inner = values
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    with pytest.raises(ConfigError, match=".".join(place)):
        imported(written(tmp_path, values))


CHANGED = [
    ("raa/cub", {"scale": 0}, {"scale": 20.0}),
    ("raa/cub", {"weight_decay": None, "min_lr": None}, {"weight_decay": 5e-4, "min_lr": 1e-8}),
    ("raa/cub", {"min_lr": "1e-8"}, {"min_lr": 1e-8}),
    ("raa/cub", {"dataset": "ImageNetR"}, {"dataset": "imagenetr"}),
    ("raa/cub", {"perturb": False, "optimizer": "adam", "init_lr": 0.02},
     {"sam": None, "optimizer": "adamw", "lrate": 0.02, "ca_lrate": 0.02}),
    ("raa/cub", {"ca": False, "ca_epochs": 5}, {"ca_epochs": 0}),
    ("raa/cub", {"ssca": False}, {"shift": False}),
    ("raa/cub", {"init_lr": 0.05}, {"lrate": 0.01, "ca_lrate": 0.05}),
    ("raa/cub", {"convnet_type": "pretrained_vit_b16_224_adapter"}, {"backbone": f"{IN21K}_ft_in1k"}),
    ("raa/cub", {"init_cls": 100}, {"init_cls": 100, "increment": 20}),
    ("inflora/cifar224", {"dataset": "ImageNet_A", "total_sessions": 20},
     {"dataset": "imageneta", "train_transform": "crop_flip_scale05", "test_transform": "resize_crop_bicubic"}),
    ("inflora/cifar224", {"dataset": "cub", "total_sessions": 20},
     {"dataset": "cub", "test_transform": "resize_crop_bicubic"}),
    ("inflora/cifar224", {"dataset": "cifar10", "init_cls": 2, "increment": 2, "total_sessions": 5},
     {"dataset": "cifar10", "test_transform": "resize"}),
    ("inflora/cifar224", {"init_epoch": 30, "init_lr": 1e-3}, {"init_epoch": 30, "init_lr": 1e-3}),
    ("inflora/cifar224_ca", {"init_epoch": 30, "init_lr": 1e-2},
     {"init_epoch": None, "init_lr": None, "milestones": (18,)}),
    ("inflora/cifar224_b5", {"optim": "sgd", "weight_decay": 1e-3, "init_weight_decay": 1e-3},
     {"scheduler": "cosine", "init_weight_decay": 0.0, "weight_decay": 1e-3}),
    ("inflora/imagenetr_t10_ca", {"dataset": "cifar100", "init_cls": 10, "increment": 10},
     {"ca_with_logit_norm": 0.0, "ca_epochs": 5, "fresh_final_norm": False}),
    ("inflora/domainnet", {"dataset": "cub", "init_cls": 20, "increment": 20, "total_sessions": 10},
     {"milestones": (18,)}),
    ("slca/cifar224_in21k", {"milestones": ..., "epochs": ..., "ca_epochs": ...},
     {"milestones": (60, 100, 140), "epochs": 20, "ca_epochs": 5, "scheduler": "multistep"}),
    ("slca/cifar224_in21k", {"weight_decay": 0.1, "lr": 0.02}, {"weight_decay": 5e-4, "lrate": 0.02}),
    ("slca/cifar224_in21k", {"ca_with_logit_norm": ...}, {"ca_with_logit_norm": 0.0}),
    ("slca/cifar224_in21k", {"ca_with_logit_norm": -1}, {"ca_with_logit_norm": 0.0}),
    ("slca/cifar224_in21k", {"dataset": "resisc45"},
     {"dataset": "folder:DIR", "train_transform": "resize300_crop_flip"}),
    ("slca/cifar224_in21k", {"dataset": "imagenet100"},
     {"train_transform": "crop_flip", "test_transform": "resize_crop"}),
    ("slca/cifar224_in21k", {"dataset": "cifar100"},
     {"train_transform": "pad_crop_flip_jitter", "test_transform": "none"}),
    ("slcapp/cifar224_in21k", {"bcb_lrscale": ...}, {"bcb_lrscale": 0.01, "min_lr": 1e-5}),
    ("slcapp/cifar224_in21k", {"convnet_type": "vit-b-p16"}, {"lora_rank": 0}),
    ("slcapp/cifar224_in21k", {"weight_decay": ...}, {"weight_decay": 5e-4}),
]  # fmt: skip


@pytest.mark.parametrize("name, change, expected", CHANGED, ids=[str(number) for number in range(len(CHANGED))])
def test_values_are_carried_over(tmp_path, name, change, expected):
    """... in a change takes the key away."""
    values = {key: value for key, value in (SHIPPED[name] | change).items() if value is not ...}
    config = config_from(imported(written(tmp_path, values))[0], "imported")
    assert {key: getattr(config, key) for key in expected} == expected


def test_hcl_without_its_flag_has_one_network(tmp_path):
    values, remarks = imported(written(tmp_path, SHIPPED["hcl/cifar10_distil"]))
    config = config_from(values, "imported")
    assert config.backbone == "small_resnet18" and config.networks is None
    assert any("--cl_default" in remark for remark in remarks)


def test_hcl_with_validation_and_a_seed(tmp_path):
    values = SHIPPED["hcl/cifar10_distil"] | {"seed": 7}
    config = config_from(imported(written(tmp_path, values), ["--hcl", "--validation"])[0], "imported")
    assert (config.validation, config.evaluate_on, config.select_on, config.seed) == (0.1, "val", "val", 7)


@pytest.mark.parametrize("flags", [["--flags", "--hcl"], ["--flags", "--hcl --cl_default"], ["--flags=--hcl"]])
def test_command_writes_a_config_that_loads(tmp_path, capsys, flags):
    theirs, output = written(tmp_path, SHIPPED["hcl/cifar10_qdi"]), tmp_path / "out" / "x.json"
    assert main.main(["import", str(theirs), *flags, "--output", str(output)]) == 0
    assert "the same run is shipped: exps/hcl/cifar10_qdi.json" in capsys.readouterr().out
    assert shipped_like(load_config(str(output)), EXPS) == ["exps/hcl/cifar10_qdi.json"]
    assert (output.parent / json.loads(output.read_text())["$schema"]).resolve() == EXPS / "schema" / "hcl.json"
    assert main.main(["import", str(theirs), *flags, "--output", str(output)]) == 2
    assert "is there already" in capsys.readouterr().err


def test_command_prints_the_config_alone_on_standard_output(tmp_path, capsys):
    assert main.main(["import", str(written(tmp_path, SHIPPED["slca/cars_in21k"]))]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["model_name"] == "slca"
    assert "ignored: " in captured.err


def test_flags_that_are_none_of_theirs_are_named():
    assert parse_flags("--hcl --data_dir ../Data -c x.yaml --validation") == [
        "--hcl",
        "--data_dir",
        "-c",
        "--validation",
    ]
    with pytest.raises(UserError, match='did you mean "--validation"'):
        parse_flags("--hcl --validatoin")


@pytest.mark.parametrize("name", ["raa/cub", "simplecil/cub", "inflora/cifar224", "slca/cars_in21k", "hcl/cifar10_qdi"])
def test_a_config_of_theirs_given_to_a_run_is_answered_with_the_command(tmp_path, capsys, name):
    path = written(tmp_path, SHIPPED[name])
    assert main.main(["--config", str(path), "--check"]) == 2
    assert f"python main.py import {path}" in capsys.readouterr().err


def test_of_a_key_that_stands_twice_the_last_one_counts_as_in_their_code(tmp_path):
    path = written(tmp_path, SHIPPED["raa/cub"])
    path.write_text(path.read_text()[:-1] + ', "margin": 0.3}')
    values, remarks = imported(path)
    assert values["margin"] == 0.3 and any('"margin" stands twice' in remark for remark in remarks)
    path = written(tmp_path, SHIPPED["hcl/cifar10_distil"])
    path.write_text(path.read_text() + "seed: 5\n")
    values, remarks = imported(path)
    assert values["seed"] == 5 and any('"seed" stands twice' in remark for remark in remarks)


@pytest.mark.parametrize("text, suffix, told", [
    ("{", "json", "not valid JSON at line 1"), ("[1]", "json", "holds a list"), ("a: [", "yaml", "not valid YAML"),
    ("- 1", "yaml", "holds a list"), ('{"a": 1}', "json", "no config of a family that can be imported"),
])  # fmt: skip
def test_files_that_are_no_config_are_answered(tmp_path, text, suffix, told):
    (tmp_path / f"x.{suffix}").write_text(text)
    with pytest.raises(ConfigError, match=told):
        imported(tmp_path / f"x.{suffix}")


def test_a_missing_file_names_its_neighbour(tmp_path):
    written(tmp_path, SHIPPED["raa/cub"], "adapter_cub")
    with pytest.raises(ConfigError, match='did you mean "adapter_cub.json"'):
        imported(tmp_path / "adapter_cubs.json")


def test_ours_is_told_apart(tmp_path, capsys):
    assert main.main(["import", str(EXPS / "quickstart.json")]) == 2
    assert "config of this program already" in capsys.readouterr().err
