-- Forget a running record; 0 when the token is not the owner's.
-- KEYS[1] record, and the channel its watchers listen to; ARGV: format, token
local found = redis.pcall('HMGET', KEYS[1], 'v', 's', 't', 'w')
if found.err then
  if string.find(found.err, 'WRONGTYPE', 1, true) then return 0 end
  return found
end
local version = tonumber(found[1] or '')
if found[3] ~= ARGV[2] or found[2] ~= '1' or not version or version > tonumber(ARGV[1]) then return 0 end
redis.call('DEL', KEYS[1])
if found[4] == '1' then redis.pcall('PUBLISH', KEYS[1], '') end
return 1
