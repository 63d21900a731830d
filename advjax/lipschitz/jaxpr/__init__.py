"""Programs: an interpreter of jaxprs, and the Lipschitz properties of their operations."""
