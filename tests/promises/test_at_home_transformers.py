"""In transformers a tower is one of its own: the order of imports, and the errors.

The table of Auto classes and pipelines, by folder and by repository, is in test_at_home_table; every timm class by
`AutoModel` in test_every_class.
"""

from pathlib import Path

import pytest
import torch
from transformers import AutoModel

from hf_timm_tower import TimmModel

from ..home_processes import make_environment


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tower")
    TimmModel("test_vit", 16).save_pretrained(folder)
    return folder


def test_without_package_and_trust_the_error_is_transformers_own_and_without_timm_it_names_timm(
    tower: Path, tmp_path: Path
) -> None:
    refused = make_environment(tmp_path / "venv", without=("timm",)).run(
        """
        import sys
        from transformers import AutoImageProcessor, AutoModel
        for auto in (AutoModel, AutoImageProcessor):
            try:
                auto.from_pretrained(sys.argv[1], trust_remote_code=False)
            except ValueError as error:
                print(error)
        try:
            AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        except ImportError as error:
            print(error)
        """,
        tower,
    )
    assert refused.count("pass the argument `trust_remote_code=True`") == 2
    assert "not found in your environment: timm" in refused


def test_the_package_may_be_imported_last(tower: Path, tmp_path: Path) -> None:
    printed = make_environment(tmp_path / "venv").run(
        """
        import sys
        from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageClassification
        import hf_timm_tower
        for auto in (AutoConfig, AutoImageProcessor, AutoModel):
            print(type(auto.from_pretrained(sys.argv[1])).__name__)
        """,
        tower,
        with_package=True,
    )
    assert printed.split() == ["TimmTowerConfig", "TimmTowerImageProcessor", "TimmTowerModel"]


def test_a_tower_loads_by_its_own_file_on_a_timm_without_what_saving_needs(tower: Path, tmp_path: Path) -> None:
    # what timm 1.0.30 lacks of 1.0.31
    printed = make_environment(tmp_path / "venv").run(
        """
        import sys
        import timm.models, timm.models._manipulate
        for module in (timm.models, timm.models._manipulate):
            for name in ("get_model_args", "get_model_traits", "update_model_input_size"):
                vars(module).pop(name, None)
        import torch
        from transformers import AutoModel
        model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
        torch.save(model(torch.ones(1, 3, 160, 160)).pooler_output, sys.argv[2])
        """,
        tower,
        tmp_path / "embedding.pt",
    )
    assert "Error" not in printed
    expected = TimmModel.from_pretrained(tower)(torch.ones(1, 3, 160, 160))
    assert torch.equal(torch.load(tmp_path / "embedding.pt"), expected)


def test_a_trunk_without_a_head_of_its_own_runs_once(tmp_path: Path) -> None:
    # timm's `forward_head` of this class raises; a tower as wide as timm has it has 300 million parameters
    narrow = {"channel_multiplier": 0.1}
    tower = TimmModel("mobilenetv5_300m_enc", proj="none", pool="none", image_size=64, model_kwargs=narrow)
    tower.save_pretrained(tmp_path)
    image = torch.randn(1, 3, 64, 64)
    model = AutoModel.from_pretrained(tmp_path)
    calls = []
    model.trunk.msfa.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(model(image).pooler_output, tower.eval()(image))
    assert len(calls) == 1
