"""What a bootstrap registry promises on SGLang's wire, put to any server there. Asks and judges; prints nothing."""
