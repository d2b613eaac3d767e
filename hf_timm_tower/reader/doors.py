"""The one file that `auto_map` names: where transformers finds a tower's classes when this package is absent.

It imports every file that travels, not only those of the classes: of a folder's code some versions of transformers
(5.4 among them) copy what the named file imports itself, and not what those files import. And it imports every package
that is needed: transformers looks here for what is missing, and names it.
"""
# ruff: noqa: F401

import huggingface_hub
import numpy
import PIL
import safetensors
import timm
import torch

from ..files.disk import locked_folder
from ..files.fingerprint import probe_image
from ..files.folder import TowerFiles
from ..files.json import parse_json
from ..files.open_folder import OpenFolder
from ..files.safetensors_layout import Entry, write_aligned
from ..files.sentence_transformers import sentence_files
from ..files.staging import staged_folder
from ..files.ties import Ties
from ..files.weights import WeightPlan
from ..heads.batch_formula import check_formula
from ..heads.dead_code import prune
from ..heads.head_code import describe_code
from ..heads.head_operators import known_operators
from ..heads.head_source import gather_source
from ..heads.head_statements import is_installed
from ..heads.isolation import copy_head
from ..heads.to_graph import describe
from ..heads.trace import Trace
from ..heads.trace_modes import Mode
from ..heads.verify import verify_head
from ..hub.card import TowerFacts
from ..hub.card_merge import Wanted
from ..hub.card_options import CardOptions
from ..hub.card_snippets import snippets
from ..hub.card_yaml import edit_yaml
from ..hub.code_files import code_files
from ..hub.download import Access
from ..hub.dual_encoder import TowerTextConfig, TowerTextModel
from ..hub.identify import describe_foreign
from ..hub.push import push_folder
from ..hub.trunk_source import TrunkSource
from ..training.layer_groups import LayerGroup
from .build import Tower
from .config import TimmTowerConfig
from .errors import TowerError
from .freezing import freeze
from .frozen_statistics import keeps_statistics
from .graph_audit import parse_graph
from .graph_dry_run import check_runs
from .graph_head import HeadPart
from .graph_json import only
from .graph_layers import Layer
from .graph_ops import name_of
from .graph_program import read_program
from .graph_records import TensorSpec
from .graph_values import dtype_name
from .head import builtin_head
from .image_processing import preprocess_from_timm
from .image_processor import TimmTowerImageProcessor
from .model_args import allowed_classes
from .model_building import build_for_transformers
from .model_loading import Loading
from .modeling import TimmTowerForImageClassification, TimmTowerModel
from .modeling_base import TimmTowerPreTrainedModel
from .modeling_saving import SavesAsTower
from .pools import PoolRefused
from .processor_config import facts_of
from .skip_init import no_init
from .tensor_transform import transform_tensor
from .tower import Arrangement
from .trunk import TrunkOutput
