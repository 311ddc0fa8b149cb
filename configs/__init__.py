"""The YAML files that ship with Quintet: one folder per method, plus trainer/ and logger/."""
