"""Language models behind the protocols of `specdec.models.base`."""
