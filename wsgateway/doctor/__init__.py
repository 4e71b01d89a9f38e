"""What may be wrong with an instance and its surroundings, one check at a time.

Only this package knows how to look from outside, as a device, a backend and a sysadmin do. It changes
nothing that a gateway uses, never prints, and never shows a token, a key or an address with a
password: each check answers with a `finding.Finding`.
"""
