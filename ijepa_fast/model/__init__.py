"""The three networks of I-JEPA and the loss between them: ``vit``, ``blocks`` and ``jepa``."""
