"""The one exception the command line turns into a sentence."""

# What to do about a checkpoint that cannot be read.
ANEW = "If no other is left, train anew, into another --output-dir."


class UserError(ValueError):
    """Something in the data or the options that the person at the keyboard can mend.

    Its message is a whole sentence that names the file, the line or the option.
    """
