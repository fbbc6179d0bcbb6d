"""Words of a recipe that other rooms know."""

EMBEDDED = "embedded"
"""Names the model and the data that come with the package."""

EMBEDDED_PUBLIC = "embedded-public"
"""Names the public data that comes with the package: for the server, no row of it is in the embedded data."""

EMBEDDED_PREFERENCES = "embedded-preferences"
"""Names the embedded data with a wrong answer beside each right one (:mod:`flocktune.data.preferences`)."""

FEDERATED = ("fedit", "fedbiot")
"""The methods in which clients learn together; the others are baselines with one client, or none."""
