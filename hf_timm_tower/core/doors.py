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

from .aligned import write_aligned
from .assign import Ties
from .build import Tower
from .card import TowerFacts
from .card_merge import Wanted
from .card_options import CardOptions
from .card_snippets import snippets
from .card_yaml import edit_yaml
from .checkpoint import WeightPlan
from .code_files import code_files
from .config import TimmTowerConfig
from .disk import locked_folder
from .download import Access
from .dual_encoder import TowerTextConfig, TowerTextModel
from .errors import TowerError
from .fingerprint import probe_image
from .folder import TowerFiles
from .foreign import describe_foreign
from .freezing import freeze
from .frozen_statistics import keeps_statistics
from .graph_audit import parse_graph
from .graph_batch import check_formula
from .graph_dry_run import check_runs
from .graph_json import only
from .graph_layers import Layer
from .graph_module import HeadPart
from .graph_ops import name_of
from .graph_program import read_program
from .graph_prune import prune
from .graph_records import TensorSpec
from .graph_runs import Mode
from .graph_trace import Trace
from .graph_values import dtype_name
from .head import builtin_head
from .head_code import describe_code
from .head_copy import copy_head
from .head_graph import describe
from .head_operators import known_operators
from .head_source import gather_source
from .head_statements import is_installed
from .head_verify import verify_head
from .image_processing import preprocess_from_timm
from .image_processor import TimmTowerImageProcessor
from .layer_groups import LayerGroup
from .model_args import allowed_classes
from .model_building import build_for_transformers
from .model_loading import Loading
from .modeling import TimmTowerForImageClassification, TimmTowerModel
from .modeling_base import TimmTowerPreTrainedModel
from .modeling_saving import SavesAsTower
from .no_init import no_init
from .open_folder import OpenFolder
from .pools import PoolRefused
from .processor_config import facts_of
from .push import push_folder
from .recovery import Plan
from .safetensors_header import Entry
from .sentence_files import sentence_files
from .staging import staged_folder
from .strict_json import parse_json
from .tensor_transform import transform_tensor
from .tower import Arrangement
from .trunk import TrunkOutput
from .trunk_source import TrunkSource
