"""STUB until the trunk room lands."""
from .reader.pools import PoolRefused as UnsupportedPool, class_and_patch_tokens, own_pool  # noqa
from .reader.trunk import TrunkOutput, check_made_again, check_pool, describe_trunk, offered_pools as supported_pools, trunk_output, BUILD_ERRORS, remove_classifier  # noqa


def training_attributes(module):
    names = ("p", "drop_prob", "drop_rate", "momentum", "eps")
    return {name: value for name in names if isinstance(value := getattr(module, name, None), (int, float))}


def what_changed(live, again):
    return "The trunk or head was changed in a way that the config does not know; subclass TimmModel and override _create_trunk or _create_head."
