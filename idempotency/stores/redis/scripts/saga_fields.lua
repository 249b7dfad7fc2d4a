-- The fields of a row, in the order in which _sagas.py reads them.
local FIELDS = {'v', 'n', 'k', 'p', 't', 'o', 'f', 'i', 'a', 'c', 'w', 'r', 'z', 'd', 'l', 'b'}
