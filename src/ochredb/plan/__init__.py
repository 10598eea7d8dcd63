"""How a read is answered: filters and operators over segments. Pure: no input or output here."""
