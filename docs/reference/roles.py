"""An extension of griffe, which reads the docstrings for the site: their markup becomes Markdown's."""

import re

import griffe

ROLE = re.compile(r':(?:func|class|meth|mod|attr|data|exc):`~?([^`]+)`')
CODE = re.compile(r'(`+[^`]+`+)')


def to_markdown(text: str) -> str:
    """``:func:`name``` becomes ```name```, and outside of code ``[a][b]`` is no link."""
    pieces = CODE.split(ROLE.sub(r'`\1`', text))
    return ''.join(piece if piece.startswith('`') else piece.replace('][', ']\\[') for piece in pieces)


class Roles(griffe.Extension):
    """Changes each docstring once, when its object has been read, and shows each object in its own module only."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = to_markdown(obj.docstring.value)

    def on_package(self, *, pkg: griffe.Module, **_) -> None:
        modules = [pkg]
        for module in modules:
            for name, member in list(module.members.items()):
                if member.is_alias:
                    del module.members[name]
                elif member.is_module:
                    modules.append(member)
