"""``TrainingMixin`` in others' training loops, one file per host: ``timm_task``, ``lightning``, ``transformers``.

Nothing is imported here, so that no host needs the others' packages.
"""
