"""`TimmTowerEncoder`: a tower's trunk as an encoder of tokens, for vision-language models and encoder-decoders."""

import os
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .backbone import TimmTowerBackbone
from .encoder_config import TimmTowerEncoderConfig, token_facts
from .hub.audit import config_of, folder_errors
from .hub.trunk_source import refuse_as_part
from .reader.config import TimmTowerConfig
from .reader.errors import ConfigError, shown
from .reader.forward import run_tower, wants_dict
from .reader.hidden_states import HiddenStates
from .training.sharding import refuse_sharded
from .trunk_facts import infer_output


class TimmTowerEncoder(PreTrainedModel):  # type: ignore[no-untyped-call]
    """A tower's trunk as transformers' models of two parts use an encoder: LLaVA, `VisionEncoderDecoderModel`.

    All that it gives are tokens, those of a map in the order of its rows; the head is left out.

    Args:
        config: The config; `TimmTowerEncoderConfig.from_pretrained(tower)` makes it of a tower's.
        tower: The trunk, where there is one already; else it is built with fresh weights.

    Raises:
        ConfigError: the config has no tower, or none that can be built in this process.
        WeightsError: the trunk is stored in another repository.
    """

    config: TimmTowerEncoderConfig
    config_class = TimmTowerEncoderConfig
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012  # transformers wants lists here
    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def __init__(self, config: TimmTowerEncoderConfig, tower: TimmTowerBackbone | None = None) -> None:
        super().__init__(config)
        if tower is None and not isinstance(config.tower_config, TimmTowerConfig):
            raise ConfigError("TimmTowerEncoderConfig without tower_config: use TimmTowerEncoderConfig.from_pretrained")
        self.tower = TimmTowerBackbone(config.tower_config) if tower is None else tower
        refuse_as_part(self.tower.config)  # transformers saves an encoder, whole
        facts = token_facts(self.tower.config, self.tower.trunk)
        if wrong := [name for name, value in facts.items() if getattr(config, name) != value]:
            found = shown(getattr(config, wrong[0]))
            raise ConfigError(f"{wrong[0]}={found}: the trunk has {facts[wrong[0]]}; the config was edited")
        self._no_split_modules = self.tower._no_split_modules
        self.post_init()  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in ("config", "tower") and "tower" in self._modules:
            # One config for the trunk, also where another model assigns this one its part: what is set there acts.
            self.config.tower_config = self.tower.config

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """None: images have no table of embeddings."""

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *args: Any,
        config: Any = None,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Load an encoder, or the trunk of a tower as one, from a folder or a repository; in eval mode.

        Args:
            pretrained_model_name_or_path: A folder, or a repository's id, of an encoder or of any tower.
            args: As `PreTrainedModel.from_pretrained`.
            config: As `PreTrainedModel.from_pretrained`.
            output_loading_info: Return `(model, info)`.
            kwargs: Of a tower as `TimmTowerModel.from_pretrained`; of an encoder as `PreTrainedModel.from_pretrained`.

        Raises:
            TowerError: by what is wrong with the folder.
        """
        place = pretrained_model_name_or_path
        if config_of(place, kwargs).get("model_type") == TimmTowerEncoderConfig.model_type:
            with folder_errors(place):
                return super().from_pretrained(
                    place, *args, config=config, output_loading_info=output_loading_info, **kwargs
                )
        tower, info = TimmTowerBackbone.from_pretrained(place, output_loading_info=True, **kwargs)
        if config is None:
            config = TimmTowerEncoderConfig(tower_config=tower.config, **token_facts(tower.config, tower.trunk))
        model: Any = cls(config, tower)
        model.eval()
        return (model, info) if output_loading_info else model

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """As `PreTrainedModel.save_pretrained`.

        Raises:
            WeightsError: the weights are spread over processes.
        """
        refuse_sharded(self.state_dict(keep_vars=True) if state_dict is None else state_dict)
        super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: HiddenStates = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling | tuple[Any, ...]:
        """Run the trunk.

        Args:
            pixel_values: `[B, num_channels, H, W]`, floating; cast to the model's dtype.
            output_hidden_states: As `TimmTowerModel.forward`.
            output_attentions: As `TimmTowerModel.forward`.
            return_dict: False gives a tuple of the fields that are there.
            interpolate_pos_encoding: As `TimmTowerModel.forward`.
            kwargs: Taken and not used: models of several parts pass on to this one what is meant for the others.

        Returns:
            `last_hidden_state`: tokens `[B, N, hidden_size]`, class token and registers first. `hidden_states`: what
            the stem gives and what each block or stage gives, as tokens too; stages of other widths have these.

        Raises:
            ConfigError: the trunk gives a list; or hidden states or attentions were asked for and timm has none.
            ArgumentError: as `TimmTowerModel.forward`.
        """
        hidden = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        attentions = self.config.output_attentions if output_attentions is None else output_attentions
        features, _, states, maps = run_tower(
            self.tower, pixel_values, hidden, attentions, interpolate_pos_encoding, pools=False
        )
        if not isinstance(features, torch.Tensor):
            raise ConfigError(f"{type(self.tower.trunk).__name__} gives several features and not tokens of one width")
        layout = infer_output(self.tower.trunk, features.shape).layout
        tokens: Any = features.flatten(1, 2) if layout == "NHWC" else _tokens(features)
        inner: Any = None if states is None else tuple(map(_tokens, states))
        output = BaseModelOutputWithPooling(last_hidden_state=tokens, hidden_states=inner, attentions=maps)
        return output if wants_dict(self, return_dict) else output.to_tuple()


def _tokens(state: torch.Tensor | None) -> torch.Tensor | None:
    """A map `[B, C, H, W]` as tokens `[B, H * W, C]`; tokens as they are."""
    return state if state is None or state.ndim == 3 else state.flatten(2).transpose(1, 2)
