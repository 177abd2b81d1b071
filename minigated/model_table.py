"""Every named model of the package with its exact parameter count: what `python -m minigated models` prints."""

from minigated import lm, vit_sizes


def model_rows() -> list[dict]:
    """Language models, then backbones; `kind` says which. Counted on the meta device."""
    kinds = {"language": lm.model_rows, "vision": vit_sizes.model_rows}
    return [{"kind": kind, **row} for kind, rows in kinds.items() for row in rows()]


def format_rows(rows: list[dict]) -> str:
    """The rows as two tables for a terminal."""
    language = [row for row in rows if row["kind"] == "language"]
    vision = [row for row in rows if row["kind"] == "vision"]
    lines = [
        f"{'language model':16}{'parameters':>15}{'active':>15}  {'layers':>6} {'width':>6} {'heads':>6} {'kv':>4} "
        f"{'ffn':>6} {'experts':>8} {'vocabulary':>11}"
    ]
    lines += [
        f"{row['name']:16}{row['parameters']:>15,}{row['active']:>15,}  {row['layers']:>6} {row['width']:>6} "
        f"{row['heads']:>6} {row['kv_heads']:>4} {row['ffn_width']:>6} "
        f"{'{top_k} of {experts}'.format(**row) if row['experts'] else '-':>8} {row['vocabulary']:>11,}"
        for row in language
    ]
    title = f"{'vision model':31}{'parameters':>12}  {'classes':>7} {'pixels':>6} {'window':>6}"
    lines += ["", f"{title}  widths; depths; heads"]
    lines += [
        f"{row['name']:31}{row['parameters']:>12,}  {row['classes']:>7} {row['image_size'][0]:>6} "
        f"{row['window'] or 'map':>6}  {'; '.join(' '.join(map(str, row[n])) for n in ('widths', 'depths', 'heads'))}"
        for row in vision
    ]
    return "\n".join(lines)
