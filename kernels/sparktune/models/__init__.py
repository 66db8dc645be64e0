"""Model families: which module takes which op, one family a file."""

from sparktune.models.patch import PatchReport, UnknownFamilyError, patch_model, unpatch_model

__all__ = ["PatchReport", "UnknownFamilyError", "patch_model", "unpatch_model"]
