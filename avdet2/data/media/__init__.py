# Copyright (c) avdet2 authors. Licensed under Apache 2.0.
