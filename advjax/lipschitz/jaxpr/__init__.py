"""Programs: an interpreter of jaxprs, and what is known of their operations."""
