"""Encoder and decoder as graphs of other engines, which compute them in torch's place.

In: an AutoencoderKL's halves. Out: the same forwards by OpenVINO; files for ONNX Runtime or OpenVINO.
"""

from latentvae.base import lazy

__getattr__ = lazy.importer(__name__)
