"""Forward passes that compute nothing twice."""
