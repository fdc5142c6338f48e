"""FlashSloth, a small multimodal language model, as a Hugging Face library."""

from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

from .configuration_flashsloth import FlashSlothConfig
from .image_processing_flashsloth import FlashSlothImageProcessor
from .modeling_flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel
from .processing_flashsloth import FlashSlothProcessor

AutoConfig.register("flashsloth", FlashSlothConfig)
AutoModel.register(FlashSlothConfig, FlashSlothModel)
AutoModelForImageTextToText.register(FlashSlothConfig, FlashSlothForConditionalGeneration)
AutoImageProcessor.register(FlashSlothConfig, slow_image_processor_class=FlashSlothImageProcessor)
AutoProcessor.register(FlashSlothConfig, FlashSlothProcessor)

__all__ = [
    "FlashSlothConfig",
    "FlashSlothForConditionalGeneration",
    "FlashSlothImageProcessor",
    "FlashSlothModel",
    "FlashSlothProcessor",
]
