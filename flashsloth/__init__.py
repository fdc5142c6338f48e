"""FlashSloth, a small multimodal language model, as a Hugging Face library."""

import gc

# What is imported here lives as long as the process. Python would walk over all of it again and again while it grows,
# and once more at the end, in search of garbage: a third of the CPU time of a process that imports this and ends.
_collects = gc.isenabled()
gc.disable()
try:
    from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor

    from .configuration_flashsloth import FlashSlothConfig
    from .image_processing_flashsloth import FlashSlothImageProcessor
    from .modeling_flashsloth import FlashSlothForConditionalGeneration, FlashSlothModel
    from .processing_flashsloth import FlashSlothProcessor
finally:
    gc.freeze()
    if _collects:
        gc.enable()

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
