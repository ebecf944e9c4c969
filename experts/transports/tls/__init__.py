"""TLS for connections to control ports, by the standard library: certificates, and the tunnels that carry the bytes.
Who is let in by the mesh's secret is `control_port`.
"""
