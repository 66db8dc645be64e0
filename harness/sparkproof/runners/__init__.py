"""One runner a scenario kind. A runner turns a Case into a CaseResult; what it must not do is decide to pass."""
