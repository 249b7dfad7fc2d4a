-- Read rows, and remove from an index what is not there any more.
-- KEYS: sagas, and the index; ARGV: their ids
-- Reply: {now (ms), ...}: for each saga its row, false where there is none, and {} where something else is there.
local time = redis.call('TIME')
local rows = {time[1] * 1000 + math.floor(time[2] / 1000)}
for at = 1, #KEYS - 1 do
  local row = redis.pcall('HMGET', KEYS[at], unpack(FIELDS))
  if row.err or not row[1] then row = {} end
  if redis.call('EXISTS', KEYS[at]) == 0 then
    redis.call('ZREM', KEYS[#KEYS], ARGV[at])
    row = false
  end
  rows[at + 1] = row
end
return rows
